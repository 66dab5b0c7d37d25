"""The numbers of `SoftMoE`'s slots and of `MMoE`'s tasks, against NumPy, on every backend."""

import csv
import json

import keras
import numpy as np
import pytest

from keras_moe import callbacks, layers
from keras_moe.inspection.alarms import alarms as find_alarms
from keras_moe.inspection.health import health
from keras_moe.inspection.layer_numbers import layer_numbers
from tests.contract import run
from tests.helpers import some_everywhere

ops = keras.ops
SOFT = ("combine_min", "combine_max", "dispatch_min", "dispatch_max", "slot_cosine")

of_python = pytest.mark.one_backend("what the callback writes of numbers that others compare")


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def ranges_by_hand(routing, mask, causal):
    """Per sequence: the least and most dispatched real token, over the mean real token."""
    dispatch = ops.convert_to_numpy(routing.dispatch).astype("float64")
    found = []
    for b, is_token in enumerate(mask):
        for n in np.flatnonzero(is_token) if causal else [None] * bool(is_token.any()):
            mass = (dispatch[b] if n is None else dispatch[b, n]).sum(axis=(-2, -1))
            real = is_token if n is None else is_token & (np.arange(len(is_token)) <= n)
            found.append(
                (mass[real].min() / mass[real].mean(), mass[real].max() / mass[real].mean())
            )
    return np.array(found)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "scale", some_everywhere({"1.0": 1.0, "8.0": 8.0}, ["8.0"], "a number of the same program")
)
def test_soft_counts_against_numpy(causal, masked, scale):
    layer = layers.SoftMoE(3, 8, slots_per_expert=2, causal=causal)
    x, mask = tokens(4, 5, 6), np.ones((4, 5), bool)
    if masked:
        mask = np.array(
            [[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1], [1, 0, 0, 0, 0]], "bool"
        )
        x[~mask] = np.nan
    layer.build(x.shape)
    layer.router.scale.assign(scale)
    _, routing = run(layer, x, mask if masked else None, training=True, return_routing=True)
    counts = layer.running_counts()

    combine = ops.convert_to_numpy(routing.combine).astype("float64")[mask]
    np.testing.assert_allclose(counts["slot_importance"], combine.sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(counts["importance"], combine.sum(axis=(0, 2)), rtol=1e-5)
    of_experts = combine.sum(axis=-1)
    entropy = -(of_experts * np.log(of_experts)).sum()
    np.testing.assert_allclose(counts["entropy"], entropy, rtol=1e-5)
    ranges = ranges_by_hand(routing, mask, causal)
    assert counts["decisions"] == mask.sum()
    assert counts["sequences"] == len(ranges)
    np.testing.assert_allclose(counts["dispatch_min"], ranges[:, 0].sum(), rtol=1e-5)
    np.testing.assert_allclose(counts["dispatch_max"], ranges[:, 1].sum(), rtol=1e-5)

    values = health(counts)
    assert values["effective_experts"] == pytest.approx(np.exp(entropy / mask.sum()), rel=1e-5)
    assert values["effective_experts"] <= 3 + 1e-5
    slots = combine.sum(axis=0)
    assert values["combine_min"] == pytest.approx(slots.min() / slots.mean(), rel=1e-5)
    assert values["combine_max"] == pytest.approx(slots.max() / slots.mean(), rel=1e-5)
    assert values["dispatch_min"] == pytest.approx(ranges[:, 0].mean(), rel=1e-5)
    assert values["dispatch_max"] == pytest.approx(ranges[:, 1].mean(), rel=1e-5)


def test_one_token_that_takes_all_slots():
    """With a large scale the slots see the one token that is like them."""
    layer = layers.SoftMoE(2, 4, phi_initializer="ones", scale_initializer=lambda s, dtype: 100.0)
    x = np.full((1, 4, 3), -1.0, "float32")
    x[0, 2] = 1.0
    layer(x, training=True)
    values = health(layer.running_counts())
    assert values["dispatch_max"] == pytest.approx(4.0)
    assert values["dispatch_min"] == pytest.approx(0.0, abs=1e-6)
    assert values["combine_min"] == values["combine_max"] == pytest.approx(1.0)  # equal slots
    assert layer_numbers(layer, layer.running_counts())["slot_cosine"] == pytest.approx(1.0)


def test_what_is_not_finite_is_left_out():
    layer = layers.SoftMoE(3, 8)
    x = tokens(3, 5, 6)
    run(layer, x[:2], training=True)
    expected = layer.running_counts()
    layer.reset_running_counts()
    x[2, 1, 0] = np.nan
    run(layer, x, training=True)
    counts = layer.running_counts()
    assert counts["decisions"] == 14  # combine weights are each token's own
    assert counts["importance"].sum() == pytest.approx(14, rel=1e-6)
    for name in ("sequences", "dispatch_min", "dispatch_max"):  # and dispatch weights are shared
        assert counts[name] == pytest.approx(expected[name], rel=1e-6)


def test_slot_cosine():
    layer = layers.SoftMoE(3, 8, slots_per_expert=2)
    layer.build((None, 4, 5))
    phi = ops.convert_to_numpy(layer.router.phi).astype("float64").reshape(5, 6)
    pairs = [
        abs(phi[:, i] @ phi[:, j]) / np.linalg.norm(phi[:, i]) / np.linalg.norm(phi[:, j])
        for i in range(6)
        for j in range(6)
        if i != j
    ]
    found = layer_numbers(layer, layer.running_counts(), ["slot_cosine"])
    assert found == {"slot_cosine": pytest.approx(np.mean(pairs), rel=1e-6)}


@pytest.mark.parametrize("arguments", [{"mixing": "uniform"}, {"mixing": "identity"}])
def test_no_slot_cosine_without_phi(arguments):
    layer = layers.SoftMoE(3, 8, **arguments)
    run(layer, tokens(2, 3, 4), training=True)
    values = layer_numbers(layer, layer.running_counts())
    assert "slot_cosine" not in values
    for name in SOFT[:-1]:
        assert values[name] == pytest.approx(1.0, rel=1e-5)
    one_slot = layers.SoftMoE(1, 8)
    run(one_slot, tokens(2, 3, 4), training=True)
    assert "slot_cosine" not in layer_numbers(one_slot, one_slot.running_counts())


def mmoe_and_gates(tasks, mask=None):
    layer = layers.MMoE(4, [5], tasks, name="mmoe")
    _, routing = run(layer, tokens(8, 6), mask, training=True, return_routing=True)
    return layer, ops.convert_to_numpy(routing.weights).astype("float64")


@pytest.mark.parametrize(
    "tasks, names", [(["ctr", "like"], ["ctr", "like"]), (2, ["task_0", "task_1"])]
)
def test_task_numbers_against_numpy(tasks, names):
    mask = np.array([1, 1, 1, 0, 1, 0, 1, 1], "bool")
    layer, gates = mmoe_and_gates(tasks, mask)
    values = layer_numbers(layer, layer.running_counts(), ["task_entropy", "task_gates"])
    gates = gates[mask]
    expected = {}
    for task, name in enumerate(names):
        own = gates[:, task]
        expected[f"{name}/entropy"] = -(own * np.log(own)).sum(axis=-1).mean()
        expected |= {f"{name}/expert_{e}": own[:, e].mean() for e in range(4)}
    assert values == pytest.approx(expected, rel=1e-5)


def fit(monitor):
    inputs = keras.Input((5, 6))
    x = layers.SoftMoE(3, 8, name="soft")(inputs)
    x = layers.MMoE(4, [6], ["ctr", "like"], name="mmoe")(x)
    model = keras.Model(inputs, keras.layers.Add()([x["ctr"], x["like"]]))
    model.compile("sgd", "mse")
    data = tokens(24, 5, 6)
    history = model.fit(data, data, epochs=2, batch_size=8, verbose=0, callbacks=[monitor]).history
    return {name: values for name, values in history.items() if "/" in name}, model


def task_keys():
    return {
        f"mmoe/{task}/{number}"
        for task in ("ctr", "like")
        for number in ["entropy", *(f"expert_{e}" for e in range(4))]
    }


def test_logs_on_request():
    asked, model = fit(callbacks.ExpertMonitor(metrics=[*SOFT, "task_entropy", "task_gates"]))
    assert set(asked) == {f"soft/{name}" for name in SOFT} | task_keys()
    cosines = model.get_layer("soft").slot_cosines()
    last = (cosines.sum() - np.trace(cosines)) / 6
    assert asked["soft/slot_cosine"][-1] == pytest.approx(last, rel=1e-6)  # trained, not initial


@of_python
def test_other_logs_on_request():
    by_default, _ = fit(callbacks.ExpertMonitor())
    assert set(by_default) == {
        f"{layer}/{name}" for layer in ("soft", "mmoe") for name in ("importance_cv", "entropy")
    }
    assert set(fit(callbacks.ExpertMonitor(metrics="task_entropy"))[0]) == {
        "mmoe/ctr/entropy",
        "mmoe/like/entropy",
    }
    everything, _ = fit(callbacks.ExpertMonitor(metrics="all"))
    assert {f"soft/{name}" for name in SOFT} | task_keys() < set(everything)


@of_python
def test_files_have_them_always(tmp_path):
    monitor = callbacks.ExpertMonitor(
        csv=tmp_path / "a.csv", json=tmp_path / "a.jsonl", log_dir=tmp_path / "tb"
    )
    fit(monitor)
    with (tmp_path / "a.csv").open() as file:
        (_, row) = csv.DictReader(file)
    line = json.loads((tmp_path / "a.jsonl").read_text().splitlines()[1])
    keys = {f"soft/{name}" for name in SOFT} | task_keys()
    assert keys < set(row) and keys < set(line)
    for key in keys:
        assert float(row[key]) == line[key]
    for task in ("ctr", "like"):
        assert sum(line[f"mmoe/{task}/expert_{e}"] for e in range(4)) == pytest.approx(1.0)
    assert np.shape(line["counts"]["soft"]["slot_importance"]) == (3, 1)
    (events,) = (tmp_path / "tb").iterdir()
    raw = events.read_bytes()
    assert all(key.encode() in raw for key in keys)


@of_python
def test_a_dead_expert_of_soft_moe_is_told_what_it_can_do():
    slots = np.array([[60.0], [40.0], [0.0]])
    counts = {"importance": slots.sum(axis=-1), "slot_importance": slots, "decisions": 100.0}
    counts |= {"entropy": 60.0, "sequences": 10.0, "dispatch_min": 5.0, "dispatch_max": 20.0}
    (alarm,) = find_alarms(layers.SoftMoE(3, 8), counts)
    assert (
        "1 of 3 experts get less than 1 % of their share: [2]. Try fewer experts." in alarm.message
    )
    gates = np.array([[60.0, 40.0, 0.0]])
    counts = {"importance": gates, "decisions": 100.0, "entropy": np.array([60.0])}
    (alarm,) = find_alarms(layers.MMoE(3, [4], 1), counts)
    assert alarm.message.endswith("[2]. Try `gate_dropout=0.1`, or fewer experts.")
