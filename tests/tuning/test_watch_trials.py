"""Each trial writes its own files, and a trial whose routing collapses ends and says so."""

import json

import keras
import keras_tuner
import numpy as np
import pytest

from keras_moe import layers, tuning

pytestmark = pytest.mark.one_backend("keras-tuner calls `fit`")
X = np.abs(np.random.default_rng(0).normal(size=(128, 6))).astype("float32") + 3.0
EPOCHS = 4


def build(hp):
    """A router with one favourite, or an even one."""
    name = hp.Choice("router", ["switch", "random"])
    inputs = keras.Input((6,))
    model = keras.Model(
        inputs, layers.MoE(4, 6, router=name, balance_weight=None, name="moe")(inputs)
    )
    model.compile("sgd", "mse")
    return model


def search(folder, **watching):
    tuner = keras_tuner.GridSearch(
        build, objective="val_loss", executions_per_trial=2, directory=folder / "tuner"
    )
    tuning.watch_trials(tuner, folder / "experts", **watching)
    tuner.search(X, X, validation_data=(X, X), epochs=EPOCHS, verbose=0)
    return {trial.hyperparameters.get("router"): trial for trial in tuner.oracle.trials.values()}


def epochs_of(folder, trial, execution):
    path = folder / "experts" / f"trial_{trial.trial_id}" / f"experts_{execution}.jsonl"
    assert path.with_suffix(".csv").exists()
    return [json.loads(line)["epoch"] for line in path.read_text().splitlines()]


def test_a_collapse_ends_a_trial(tmp_path):
    keras.utils.set_random_seed(0)
    trials = search(tmp_path)
    assert set(trials) == {"switch", "random"}
    for execution in range(2):
        assert epochs_of(tmp_path, trials["switch"], execution) == [0, 1]
        assert epochs_of(tmp_path, trials["random"], execution) == list(range(EPOCHS))
    assert trials["switch"].message.startswith("Pruned: dead in moe, epoch 2: ")
    assert trials["random"].message is None
    assert {trial.status for trial in trials.values()} == {"COMPLETED"}
    assert np.isfinite(trials["switch"].score)


def test_nothing_is_pruned_on_request(tmp_path):
    trials = search(tmp_path, prune=())
    assert epochs_of(tmp_path, trials["switch"], 1) == list(range(EPOCHS))
    with pytest.raises(ValueError, match=r"`prune` must be one of .* Received: prune='slow'"):
        tuning.watch_trials(None, tmp_path, prune=["slow"])
