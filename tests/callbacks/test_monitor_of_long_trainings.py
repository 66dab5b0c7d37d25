"""Files of trainings that go on or cannot write, several batches per call, and no counting."""

import csv
import json
import warnings

import keras
import numpy as np
import pytest

from keras_moe import callbacks, layers

pytestmark = pytest.mark.one_backend("what is read are NumPy arrays")
X = np.random.default_rng(0).normal(size=(24, 6)).astype("float32")


def model_of():
    inputs = keras.Input((6,))
    model = keras.Model(inputs, layers.MoE(4, 8, name="moe")(inputs))
    model.compile("sgd", "mse")
    return model


def fit(model, *monitors, **arguments):
    return model.fit(X, X, batch_size=8, verbose=0, callbacks=list(monitors), **arguments)


def rows_of(folder):
    with (folder / "e.csv").open() as file:
        table = [row["epoch"] for row in csv.DictReader(file)]
    lines = [json.loads(line) for line in (folder / "e.jsonl").read_text().splitlines()]
    assert [int(epoch) for epoch in table] == [line["epoch"] for line in lines]
    return [line["epoch"] for line in lines]


def test_a_training_that_goes_on_adds_to_its_files(tmp_path):
    def monitor():
        return callbacks.ExpertMonitor(csv=tmp_path / "e.csv", json=tmp_path / "e.jsonl")

    model = model_of()
    fit(model, monitor(), epochs=3)
    assert rows_of(tmp_path) == [0, 1, 2]
    fit(model, monitor(), epochs=4, initial_epoch=2)  # from the weights of the second
    assert rows_of(tmp_path) == [0, 1, 2, 3]
    first = (tmp_path / "e.csv").read_text().splitlines()[1]
    fit(model, monitor(), epochs=5, initial_epoch=4, validation_data=(X, X))
    assert rows_of(tmp_path) == [0, 1, 2, 3, 4]
    assert first in (tmp_path / "e.csv").read_text()
    fit(model, monitor(), epochs=1)
    assert rows_of(tmp_path) == [0]


def test_a_number_that_is_new_gets_a_column(tmp_path):
    from keras_moe.callbacks.writers import CsvWriter

    path = tmp_path / "e.csv"
    for first, scalars in ((0, {"a": 1.0}), (1, {"a": 2.0, "b": 3.0})):
        writer = CsvWriter(path, first)
        writer.write(first, scalars, {})
        writer.close()
    assert path.read_text().splitlines() == ["epoch,a,b", "0,1.0,", "1,2.0,3.0"]


def test_several_batches_per_call():
    """`every` counts batches, not the calls of the callback."""
    looks = []

    class Counting(callbacks.ExpertMonitor):
        def _logs(self, new):
            looks.append(1)
            return super()._logs(new)

    model = model_of()
    model(X)
    for every, expected in ((10, 6), (32, 3), (1, 6)):
        looks.clear()
        monitor = Counting(every=every)
        monitor.set_model(model)
        monitor.on_train_begin()
        monitor.on_epoch_begin(0)
        for last in range(15, 96, 16):  # as Keras calls with `steps_per_execution=16`
            monitor.on_train_batch_end(last, {})
        assert len(looks) == expected


def test_training_goes_on_where_files_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    (tmp_path / "e.csv").write_text("something else\nentirely\n")
    monitor = callbacks.ExpertMonitor(
        csv=tmp_path / "e.csv",
        json=tmp_path / "file" / "e.jsonl",
        log_dir=tmp_path / "file" / "logs",
    )
    with pytest.warns(callbacks.ExpertAlarm, match="is not written") as warned:
        history = fit(model_of(), monitor, epochs=3, initial_epoch=1)
    assert len(history.history["loss"]) == 2
    named = [str(each.message) for each in warned if each.category is callbacks.ExpertAlarm]
    assert len(named) == 3
    assert any("e.jsonl` is not written: FileExistsError" in each for each in named), named
    assert (tmp_path / "e.csv").read_text().startswith("something else")


def test_a_monitor_given_twice_writes_once(tmp_path):
    monitor = callbacks.ExpertMonitor(csv=tmp_path / "e.csv", json=tmp_path / "e.jsonl")
    model = model_of()
    with pytest.warns(callbacks.ExpertAlarm, match="given twice. Training goes on"):
        fit(model, monitor, monitor, epochs=2, validation_data=(X, X))
    assert rows_of(tmp_path) == [0, 1]
    with warnings.catch_warnings():
        warnings.simplefilter("error", callbacks.ExpertAlarm)
        fit(model, monitor, epochs=1)


def test_two_monitors_agree():
    model = model_of()
    one, two = callbacks.ExpertMonitor(), callbacks.ExpertMonitor(metrics=["load_cv"])
    history = fit(model, one, two, epochs=2, validation_data=(X, X)).history
    task = np.array(history["val_loss"]) - history["val_aux_loss"]
    model.compile("sgd", "mse", metrics=["mse"])
    logs = model.evaluate(X, X, verbose=0, return_dict=True)
    assert task[-1] == pytest.approx(logs["mse"], abs=1e-3)
    assert model.get_layer("moe").running_counts()["decisions"] == 48


def test_counting_can_be_switched_off():
    inputs = keras.Input((4, 6))
    x = layers.MoE(4, 8, name="moe")(inputs)
    x = layers.SoftMoE(4, 8, name="soft")(x)
    x = layers.MMoE(4, [6], ["a"], name="mmoe")(x)["a"]
    model = keras.Model(inputs, x)
    model.compile("sgd", "mse")
    mixtures = [model.get_layer(name) for name in ("moe", "soft", "mmoe")]
    for layer in mixtures:
        layer.counts_in_training = False
    x = np.tile(X[:, None], (1, 4, 1))
    history = model.fit(x, x, verbose=0, callbacks=[callbacks.ExpertMonitor(metrics="all")])
    assert set(history.history) == {"loss"}
    assert not any(np.any(layer.running_counts()["decisions"]) for layer in mixtures)
