"""`ExpertMonitor` shows true numbers in the progress bar and the history, on every backend."""

import keras
import numpy as np
import pytest

from keras_moe import callbacks, layers, routers


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


def test_scalars_are_in_the_progress_bar(capsys):
    fit(layers.SwitchFFN(4, 8, name="switch"), verbose=1, epochs=1)
    shown = capsys.readouterr().out
    for key in ("switch/load_cv", "switch/dropped", "switch/entropy"):
        assert key in shown


def test_values_when_one_expert_takes_everything():
    """The router always picks expert 0: load CV is sqrt(E - 1), and all but C tokens drop."""
    kernel = np.zeros((6, 4), "float32")
    kernel[:, 0] = 50.0
    x = np.abs(np.random.default_rng(0).normal(size=(24, 6)).astype("float32")) + 1.0
    router = routers.SwitchRouter(
        4,
        jitter=0.0,
        kernel_initializer=lambda shape, dtype=None: keras.ops.convert_to_tensor(kernel),
    )
    layer = layers.MoE(4, 8, router=router, capacity_factor=1.0, name="moe")
    layer.router.trainable = False
    history = fit(layer, x=x)
    np.testing.assert_allclose(history["moe/load_cv"], np.sqrt(3), rtol=1e-6)
    np.testing.assert_allclose(history["moe/dropped"], 0.75, rtol=1e-6)
    np.testing.assert_allclose(history["moe/entropy"], 0.0, atol=1e-6)


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
    from keras_moe.layers.running_sums import RunningSums

    class Counter(keras.layers.Layer):
        def build(self, input_shape):
            self.sums = RunningSums(self, "sums", (2,))

    layer = Counter()
    layer.build(())
    steps, left = divmod(total, 2**22)
    layer.sums._limbs.assign(
        np.array([[steps * 4 - 4] * 2, [0, 0]], "float32")
    )  # as if counted before: high limbs are of 2^20
    layer.sums.add(np.array([2.0**22, 2.0**22]))
    for _ in range(left):
        layer.sums.add(np.array([1.0, float("nan")]))
    assert layer.sums.read()[0] == total
    assert layer.sums.read()[1] == total - left
