"""What is counted by batch: true numbers, on every backend, and not in files."""

import h5py
import keras
import numpy as np
import pytest

from keras_moe import layers
from keras_moe.inspection.health import difference, health

ops = keras.ops


def batches():
    random = np.random.default_rng(0)
    return [random.normal(size=(2, 6, 5)).astype("float32") for _ in range(3)]


def test_against_numpy():
    layer = layers.MoE(4, 8, capacity_factor=0.7, balance_weight=0.1)
    cvs, drops, losses = [], [], []
    for number, x in enumerate(batches()):
        mask = np.ones((2, 6), bool)
        mask[:, number + 1 :] = False
        _, routing = layer(x, mask=ops.convert_to_tensor(mask), training=True, return_routing=True)
        load, asked, kept = (
            ops.convert_to_numpy(part).astype("float64")
            for part in (routing.load, routing.asked, routing.kept)
        )
        cvs.append(load.std() / load.mean())
        drops.append(1.0 - kept.sum() / asked.sum())
        losses.append(sum(float(ops.convert_to_numpy(loss)) for loss in layer.losses))
    layer(x, mask=ops.zeros((2, 6), "bool"), training=True)  # padding alone is no batch
    layer(x)
    counts = layer.running_counts()
    assert counts["batches"] == 3
    assert counts["aux_loss"] == pytest.approx(sum(losses), rel=1e-3)
    values = health(counts, has_capacity=True)
    assert values["batch_cv"] == pytest.approx(np.mean(cvs), rel=1e-3)
    assert values["worst_batch_cv"] == pytest.approx(max(cvs), rel=1e-5)
    assert values["worst_dropped"] == pytest.approx(max(drops), rel=1e-5)

    before = counts
    layer.reset_worst_batch()
    layer(batches()[0], training=True)
    new = difference(layer.running_counts(), before)
    assert new["batches"] == 1
    assert new["worst_batch_cv"] == pytest.approx(new["batch_cv"], abs=1e-3)
    layer.reset_running_counts()
    assert all(not np.any(value) for value in layer.running_counts().values())


def test_what_is_not_finite_is_left_out():
    layer = layers.MoE(4, 8)
    x = batches()[0]
    x[0, 0] = np.nan
    layer(x, training=True)
    assert all(np.isfinite(value).all() for value in layer.running_counts().values())


def test_files_are_those_of_layers_without(tmp_path):
    inputs = keras.Input((6, 5))
    model = keras.Model(inputs, layers.MoE(4, 8, name="moe")(inputs))
    model(batches()[0], training=True)
    path = tmp_path / "a.weights.h5"
    model.save_weights(path)
    with h5py.File(path) as file:
        own = [group["vars"] for group in file["layers"].values() if "router" in group]
        assert [set(group) for group in own] == [{"0", "1"}]  # load and totals
    again = keras.models.clone_model(model)
    again.load_weights(path)
    loaded = again.get_layer("moe").running_counts()
    assert loaded["decisions"] == 12 and loaded["batches"] == 0
    assert again.get_layer("moe").balance_weight == pytest.approx(0.01)
