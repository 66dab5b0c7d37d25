"""`ExpertMonitor` starts anew where weights are restored or counts are reset within an epoch."""

import math

import keras
import numpy as np
import pytest

from keras_moe import layers
from keras_moe.callbacks import ExpertMonitor
from keras_moe.inspection.health import difference

pytestmark = pytest.mark.one_backend("counts are NumPy arrays")

E = 4
MIXTURES = {
    "moe": lambda: layers.MoE(E, 8, name="mixture", capacity_factor=1.0),
    "switch": lambda: layers.SwitchFFN(E, 8, name="mixture"),
    "soft": lambda: layers.SoftMoE(E, 8, slots_per_expert=2, name="mixture"),
    "mmoe": lambda: layers.MMoE(E, [8], 2, name="mixture"),
}


class At(keras.callbacks.Callback):
    """Does something to the model once, in the second epoch or later."""

    def __init__(self, when, action, epoch=2):
        super().__init__()
        self.when, self.action, self.epoch, self.now = when, action, epoch, 0

    def _maybe(self, when):
        if when == self.when and self.now == self.epoch:
            self.action(self.model)

    def on_epoch_begin(self, epoch, logs=None):
        self.now = epoch
        self._maybe("epoch_begin")

    def on_train_batch_end(self, batch, logs=None):
        if batch == 1:
            self._maybe("batch_end")

    def on_epoch_end(self, epoch, logs=None):
        self._maybe("epoch_end")


def fitted(make, callbacks, tmp_path, epochs=4):
    inputs = keras.Input((5, 6))
    outputs = keras.tree.flatten(make()(inputs))
    model = keras.Model(
        inputs, [keras.layers.Dense(1, name=f"head_{i}")(x) for i, x in enumerate(outputs)]
    )
    model.compile("sgd", ["mse"] * len(outputs))
    x = np.random.default_rng(0).normal(size=(32, 5, 6)).astype("float32")
    path = str(tmp_path / "first.weights.h5")
    model.save_weights(path)
    history = model.fit(
        x,
        [x[..., :1]] * len(outputs),
        batch_size=8,
        epochs=epochs,
        verbose=0,
        shuffle=False,
        callbacks=callbacks(path),
    )
    return model, history.history


def monitor(**arguments):
    return ExpertMonitor(every=1, metrics="all", alarms=False, **arguments)


ACTIONS = {
    "load_weights": lambda path: lambda model: model.load_weights(path),
    "reset": lambda path: lambda model: model.get_layer("mixture").reset_running_counts(),
}


@pytest.mark.parametrize("when", ["epoch_begin", "batch_end", "epoch_end"])
@pytest.mark.parametrize("action", ACTIONS.values(), ids=ACTIONS.keys())
@pytest.mark.parametrize("make", MIXTURES.values(), ids=MIXTURES.keys())
def test_numbers_stay_possible(make, action, when, tmp_path):
    _, history = fitted(
        make, lambda path: [At(when, action(path)), monitor(), At("none", None)], tmp_path
    )
    _, expected = fitted(make, lambda path: [monitor()], tmp_path)
    assert set(history) == set(expected)
    for name, values in history.items():
        assert np.isfinite(values).all(), name
        if name.endswith("_cv"):
            assert (np.array(values) >= 0).all() and max(values) <= math.sqrt(E - 1) + 1e-6
        if name.endswith("entropy"):
            assert min(values) >= 0 and max(values) <= math.log(E) + 1e-6
        if name.endswith(("dropped", "confidence")) or "expert_" in name:
            assert min(values) >= 0 and max(values) <= 1 + 1e-6


def test_a_reset_in_an_epoch_leaves_what_was_counted_after_it(tmp_path):
    """The batches 2 and 3 of the last epoch, counted by hand."""
    reads = []
    _, history = fitted(
        MIXTURES["moe"],
        lambda path: [
            At("batch_end", ACTIONS["reset"](path)),
            At("epoch_end", lambda m: reads.append(m.get_layer("mixture").running_counts())),
            monitor(),
        ],
        tmp_path,
        epochs=3,
    )
    load = reads[0]["load"]
    assert reads[0]["decisions"] == 2 * 8 * 5
    assert history["mixture/load_cv"][-1] == pytest.approx(load.std() / load.mean())


def test_early_stopping_that_restores_the_best_weights(tmp_path):
    """It does so at the end of an epoch, before a monitor behind it reads."""
    stopping = keras.callbacks.EarlyStopping(
        "loss", patience=2, restore_best_weights=True, mode="max", verbose=0
    )
    _, history = fitted(MIXTURES["moe"], lambda path: [stopping, monitor()], tmp_path, epochs=9)
    assert len(history["loss"]) == 3
    assert 0 <= history["mixture/load_cv"][-1] <= math.sqrt(E - 1)
    assert 0 < history["mixture/entropy"][-1] <= math.log(E)


def test_counts_that_grow_are_subtracted():
    before = {"load": np.array([3.0, 4.0]), "decisions": np.array(7.0)}
    now = {"load": np.array([5.0, 4.0]), "decisions": np.array(9.0)}
    assert difference(now, before)["load"].tolist() == [2.0, 0.0]
    dropped = {"load": np.array([9.0, 3.0]), "decisions": np.array(12.0)}
    assert difference(dropped, before)["load"].tolist() == [9.0, 3.0]
