"""`ExpertMonitor` shows true numbers in the progress bar and the history, on every backend."""

import csv
import json
import subprocess
import sys

import keras
import numpy as np
import pytest

from keras_moe import callbacks, layers, routers
from keras_moe.inspection.alarms import alarms as find_alarms

of_python = pytest.mark.one_backend("what the callback writes of numbers that others compare")


def fit(*mixtures, x=None, monitor=None, epochs=2, **arguments):
    x = np.random.default_rng(0).normal(size=(24, 6)).astype("float32") if x is None else x
    inputs = outputs = keras.Input(x.shape[1:])
    for mixture in mixtures:
        outputs = keras.tree.flatten(mixture(outputs))[0]
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    monitor = monitor or callbacks.ExpertMonitor()
    arguments = {"batch_size": 8, "verbose": 0, **arguments}
    return model.fit(x, x, epochs=epochs, callbacks=[monitor], **arguments).history


def test_scalars_in_history():
    history = fit(
        layers.MoE(4, 8, name="free"),
        layers.SwitchFFN(4, 8, name="switch"),
        layers.SoftMoE(4, 8, name="soft"),
        layers.MMoE(4, [6], 3, name="tasks"),
        validation_split=0.25,
    )
    ours = {key for key in history if "/" in key}
    assert ours == {
        "free/load_cv",
        "free/entropy",
        "switch/load_cv",
        "switch/dropped",
        "switch/entropy",
        "soft/importance_cv",
        "soft/entropy",
        "tasks/importance_cv",
        "tasks/entropy",
    }
    for key in ours:
        assert len(history[key]) == 2
        assert np.isfinite(history[key]).all()
        if key.endswith("entropy"):
            assert 0 < history[key][0] <= np.log(4) + 1e-6


@of_python
def test_scalars_are_in_the_progress_bar(capsys):
    fit(layers.SwitchFFN(4, 8, name="switch"), verbose=1, epochs=1)
    shown = capsys.readouterr().out
    for key in ("switch/load_cv", "switch/dropped", "aux_loss"):
        assert key in shown
    assert "entropy" not in shown


@pytest.mark.parametrize("metrics", [None, "all"])
def test_the_bar_names_the_worst_layer_and_the_history_has_all(capsys, metrics):
    kernel = keras.initializers.Constant(np.eye(6, 4) * 50.0)
    uneven = layers.MoE(
        4, 8, router=routers.TopKRouter(4, 1, kernel_initializer=kernel), name="uneven"
    )
    even = [layers.MoE(4, 8, top_k=4, name=f"even_{index}") for index in range(5)]
    x = np.random.default_rng(0).normal(size=(24, 6)).astype("float32")
    monitor = callbacks.ExpertMonitor(metrics=metrics, alarms=False)
    history = fit(*even[:2], uneven, *even[2:], x=x, monitor=monitor, verbose=2)
    lines = [line for line in capsys.readouterr().out.splitlines() if "loss:" in line]
    assert len(lines) == 2
    for line in lines:
        assert "uneven/load_cv" in line and "even_" not in line
        assert len(line) < 120
    names = ("load_cv", "entropy") if metrics is None else ("load_cv", "worst_batch_cv")
    for layer in (uneven, *even):
        for name in names:
            assert len(history[f"{layer.name}/{name}"]) == 2
    assert history["even_3/load_cv"] == [0.0, 0.0]


def test_values_when_one_expert_takes_everything():
    """The router always picks expert 0: load CV is sqrt(E - 1), and all but C tokens drop."""
    kernel = np.zeros((6, 4), "float32")
    kernel[:, 0] = 50.0
    x = np.abs(np.random.default_rng(0).normal(size=(96, 6)).astype("float32")) + 1.0
    router = routers.SwitchRouter(
        4,
        jitter=0.0,
        kernel_initializer=lambda shape, dtype=None: keras.ops.convert_to_tensor(kernel),
    )
    layer = layers.MoE(4, 8, router=router, capacity_factor=1.0, name="moe")
    layer.router.trainable = False
    with pytest.warns(callbacks.ExpertAlarm) as warned:
        history = fit(layer, x=x, monitor=callbacks.ExpertMonitor(metrics="all"))
    np.testing.assert_allclose(history["moe/load_cv"], np.sqrt(3), rtol=1e-6)
    np.testing.assert_allclose(history["moe/dropped"], 0.75, rtol=1e-6)
    np.testing.assert_allclose(history["moe/entropy"], 0.0, atol=1e-6)
    np.testing.assert_allclose(history["moe/max_violation"], 3.0, rtol=1e-6)
    np.testing.assert_allclose(history["moe/used_experts"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(history["moe/dead_experts"], 3.0)
    np.testing.assert_allclose(history["moe/effective_experts"], 1.0, rtol=1e-6)
    np.testing.assert_allclose(history["moe/confidence"], 1.0, rtol=1e-6)
    messages = [str(each.message) for each in warned if each.category is callbacks.ExpertAlarm]
    assert [message.split(":")[0] for message in messages] == 3 * ["moe, epoch 1"]  # not again
    assert "3 of 4 experts get less than 1 % of their share: [1, 2, 3]. Try" in messages[0]
    assert "The router is all but sure of every token (entropy 0.000 of 1.39 nats)" in messages[1]
    assert (
        "75 % of the assignments are dropped, 75 % in the worst batch. Try a larger" in messages[2]
    )


def test_each_epoch_starts_anew():
    """An epoch's values are of that epoch alone, also when the layer has counted before."""
    layer = layers.MoE(4, 8, name="moe")
    history = fit(layer, epochs=3)
    counts = layer.running_counts()
    assert counts["decisions"] == 72
    assert counts["load"].sum() == counts["assignments"] == 144
    assert counts["dropped"] == 0
    assert all(value < np.log(4) + 1e-6 for value in history["moe/entropy"])
    layer.reset_running_counts()
    assert layer.running_counts()["decisions"] == 0


def test_losses_apart_from_the_tasks():
    """A mixture whose output is thrown away changes `loss` by `aux_loss` alone."""
    inputs = keras.Input((6,))
    x = layers.MoE(4, 8, balance_weight=0.3, name="a")(inputs)
    x = layers.SwitchFFN(4, 8, balance_weight=0.2, name="b")(x)
    model = keras.Model(inputs, keras.layers.Dense(1)(0.0 * x + inputs))
    model.compile("sgd", "mse", metrics=["mse"])
    x = np.random.default_rng(0).normal(size=(24, 6)).astype("float32")
    monitor = callbacks.ExpertMonitor(metrics=["aux_loss"])
    model.evaluate(x, x, verbose=0)  # compiles a program that does not count
    data = {"batch_size": 8, "verbose": 0, "callbacks": [monitor]}
    history = model.fit(x, x, validation_data=(x, x), epochs=2, **data).history
    for epoch in range(2):
        task = history["val_loss"][epoch] - history["val_aux_loss"][epoch]
        assert task == pytest.approx(history["val_mse"][epoch], abs=1e-3)
        assert history["val_aux_loss"][epoch] > 0.45
        aux = history["aux_loss"][epoch]
        assert aux > 0.45
        assert aux == pytest.approx(history["a/aux_loss"][epoch] + history["b/aux_loss"][epoch])
        assert history["loss"][epoch] - aux == pytest.approx(history["mse"][epoch], abs=1e-3)
    counts = model.get_layer("a").running_counts()
    assert counts["decisions"] == 48  # of training alone
    for watched in (True, False):
        logs = model.evaluate(
            x, x, verbose=0, return_dict=True, callbacks=[monitor] if watched else []
        )
        task = logs["loss"] - monitor.evaluated_aux_loss
        assert task == pytest.approx(logs["mse"], abs=1e-3)
        assert model.get_layer("a").running_counts()["decisions"] == 48
    soft = fit(layers.SoftMoE(4, 8))
    assert "aux_loss" not in soft  # it has none


@of_python
def test_every():
    seen = []

    class Spy(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            seen.append("moe/load_cv" in logs)

    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.MoE(4, 8, name="moe")(inputs))
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(24, 6)).astype("float32")
    model.fit(x, x, batch_size=6, verbose=0, callbacks=[callbacks.ExpertMonitor(every=2), Spy()])
    assert seen == [False, True, True, True]
    seen.clear()
    model.fit(x, x, batch_size=2, verbose=0, callbacks=[callbacks.ExpertMonitor(), Spy()])
    assert seen == [False] * 9 + [True] * 3  # a look costs: benchmarks/watching.py


@of_python
def test_nested_models_and_equal_names():
    def block():
        inputs = keras.Input((6,))
        return keras.Model(inputs, layers.MoE(4, 8, name="moe")(inputs))

    inputs = keras.Input((6,))
    model = keras.Model(inputs, block()(block()(inputs)))
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(8, 6)).astype("float32")
    history = model.fit(x, x, verbose=0, callbacks=[callbacks.ExpertMonitor()]).history
    assert {"moe/load_cv", "moe#2/load_cv"} < set(history)


@of_python
def test_a_model_without_mixtures_is_left_alone():
    assert set(fit(keras.layers.Dense(6))) == {"loss"}


def test_counts_survive_saving(tmp_path):
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.MoE(4, 8, name="moe")(inputs))
    model.compile("sgd", "mse")
    x = np.zeros((8, 6), "float32")
    model.fit(x, x, verbose=0)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras", compile=False)
    counts, loaded = (m.get_layer("moe").running_counts() for m in (model, again))
    assert counts["decisions"] == loaded["decisions"] == 8
    np.testing.assert_array_equal(counts["load"], loaded["load"])


@pytest.mark.parametrize("total", [2**24 + 3, 2**33 + 5])
def test_running_sums_are_exact_past_float32(total):
    """A float32 counter would stop at 2^24."""
    from keras_moe.layers.counts import RunningSums

    class Counter(keras.layers.Layer):
        def build(self, input_shape):
            self.sums = RunningSums(self, "sums", (2,))

    layer = Counter()
    layer.build(())
    steps, left = divmod(total, 2**22)
    layer.sums.limbs.assign(
        np.array([[steps * 4 - 4] * 2, [0, 0]], "float32")
    )  # as if counted before: high limbs are of 2^20
    layer.sums.add(np.array([2.0**22, 2.0**22]))
    for _ in range(left):
        layer.sums.add(np.array([1.0, float("nan")]))
    assert layer.sums.read()[0] == total
    assert layer.sums.read()[1] == total - left


def counted(load, decisions=100.0, entropy=100.0, **more):
    load = np.array(load, float)
    zeros = {"assignments": load.sum(), "dropped": 0.0, "confidence": 50.0}
    return {"load": load, "decisions": decisions, "entropy": entropy, **zeros, **more}


def kinds(counts, layer=None):
    layer = layer or layers.MoE(len(counts["load"]), 8, top_k=1)
    return [alarm.kind for alarm in find_alarms(layer, counts)]


@of_python
def test_alarms_by_hand():
    assert kinds(counted([25, 25, 25, 25])) == []
    assert kinds(counted([60, 20, 12, 8])) == []
    assert kinds(counted([70, 20, 6, 4])) == ["collapse"]  # a spread of 1.07 of the mean
    assert kinds(counted([32, 33, 33, 2])) == ["starved"]
    assert kinds(counted([94, 2, 2, 2])) == ["collapse"]
    assert kinds(counted([50, 49.9, 0.1, 0])) == ["dead"]
    assert kinds(counted([25, 25, 25, 25], entropy=0.5)) == ["saturation"]
    assert kinds(counted([0, 0], decisions=0.0)) == []
    assert kinds(counted([20, 0, 0], decisions=20.0)) == []  # too few to say
    assert kinds(counted([100], entropy=0.0)) == []
    dropping = layers.MoE(4, 8, capacity_factor=1.0)
    assert kinds(counted([25, 25, 25, 25], dropped=11.0), dropping) == ["drops"]
    assert kinds(counted([25, 25, 25, 25], dropped=9.0), dropping) == []


@of_python
def test_a_polarised_gate_is_named():
    layer = layers.MMoE(3, [4], ["click", "like"])
    gates = np.array([[95.0, 3.0, 2.0], [30.0, 30.0, 40.0]])
    counts = {"importance": gates, "decisions": 100.0, "entropy": np.array([20.0, 100.0])}
    (alarm,) = find_alarms(layer, counts)
    assert alarm.kind == "polarisation"
    assert "Gates that take one expert alone: 'click' (expert 0)." in alarm.message


@of_python
def test_files_hold_every_number(tmp_path):
    monitor = callbacks.ExpertMonitor(
        csv=tmp_path / "a" / "experts.csv", json=tmp_path / "experts.jsonl", log_dir=tmp_path / "tb"
    )
    history = fit(
        layers.MoE(4, 8, name="moe"), layers.MMoE(4, [6], 3, name="tasks"), monitor=monitor
    )
    with (tmp_path / "a" / "experts.csv").open() as file:
        table = list(csv.DictReader(file))
    lines = [json.loads(line) for line in (tmp_path / "experts.jsonl").read_text().splitlines()]
    (events,) = (tmp_path / "tb").iterdir()
    written = read_events(events)
    assert [row["epoch"] for row in table] == ["0", "1"]
    assert [line["epoch"] for line in lines] == [0, 1]
    names = {
        f"moe/{name}"
        for name in ("load_cv", "entropy", "max_violation", "used_experts", "dead_experts")
        + ("effective_experts", "confidence")
    }
    assert names < set(table[0]) and names < set(lines[0]) and names < set(written[0])
    assert "tasks/importance_cv" in table[0]
    for epoch in range(2):
        for name in ("moe/load_cv", "tasks/entropy"):
            expected = history[name][epoch]
            assert float(table[epoch][name]) == pytest.approx(expected, rel=1e-9)
            assert lines[epoch][name] == pytest.approx(expected, rel=1e-9)
            assert written[epoch][name] == pytest.approx(expected, rel=1e-6)
    assert sum(lines[0]["counts"]["moe"]["load"]) == 48
    assert np.shape(lines[0]["counts"]["tasks"]["importance"]) == (3, 4)


def read_events(path):
    """Scalars by epoch, by TensorBoard's own reader."""
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
    from tensorboard.compat.proto.event_pb2 import Event

    events = [Event.FromString(raw) for raw in RawEventFileLoader(str(path)).Load()]
    assert events[0].file_version == "brain.Event:2"
    return {e.step: {v.tag: v.simple_value for v in e.summary.value} for e in events[1:]}


@of_python
def test_tensorboard_is_written_without_tensorflow(tmp_path):
    """`keras.callbacks.TensorBoard` imports TensorFlow on every backend."""
    if keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow is the backend")
    code = (
        "import sys; from pathlib import Path; from keras_moe.callbacks.writers import *;"
        f"writer = TensorBoardWriter(Path({str(tmp_path)!r}), 0);"
        "writer.write(0, {'a': 1.0}, {}); writer.close();"
        "assert 'tensorflow' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@of_python
def test_monitor_comes_back_from_its_config():
    monitor = callbacks.ExpertMonitor(every=3, metrics=["max_violation"], alarms=False, csv="a.csv")
    again = callbacks.ExpertMonitor(**monitor.get_config())
    assert again.get_config() == monitor.get_config()
    assert again.metrics == ("max_violation",)
    with pytest.raises(ValueError, match=r"`metrics` must be one of .* Received: metrics='cv'"):
        callbacks.ExpertMonitor(metrics=["cv"])
