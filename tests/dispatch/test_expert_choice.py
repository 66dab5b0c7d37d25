"""Experts that choose tokens against float64: values, choices and every gradient."""

import math

import numpy as np
import pytest

from keras_moe import layers
from tests import helpers
from tests.oracle import expert_mlp, losses

D, E = 3, 4


def reference(x, weights, mask, groups, capacity):
    """The layer from the paper's equations, one token after another."""
    bank = expert_mlp.bank_of(weights, "experts")
    shares = np.array([losses.softmax(row) for row in x @ weights["router/kernel"]])
    kept, outputs = np.zeros(shares.shape, bool), np.zeros(x.shape)
    for group in np.split(np.arange(len(x)), groups):
        for e in range(E):
            best = sorted((n for n in group if mask[n]), key=lambda n: (-shares[n, e], n))
            kept[best[:capacity], e] = True
    for n, e in zip(*np.nonzero(kept), strict=True):
        outputs[n] += shares[n, e] * expert_mlp.forward(bank, e, x[n], "gelu")[0]
    return outputs, kept


def slopes(x, weights, mask, groups, capacity, cotangent, step=1e-6):
    """Central differences of sum(outputs * cotangent); who is chosen is constant near a point."""

    def objective(arrays):
        own = {name: arrays[name] for name in weights}
        return np.sum(reference(arrays["inputs"], own, mask, groups, capacity)[0] * cotangent)

    return slopes_of(objective, {"inputs": x, **weights}, step)


def slopes_of(objective, at, step=1e-6):
    """Central differences of a function of arrays by name."""
    result = {}
    for name, array in at.items():
        result[name] = np.zeros(array.shape)
        for index in np.ndindex(*array.shape):
            moved = [array.copy(), array.copy()]
            moved[0][index] += step
            moved[1][index] -= step
            high, low = (objective({**at, name: each}) for each in moved)
            result[name][index] = (high - low) / (2 * step)
    return result


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize(
    ("top_k", "factor", "group"),
    [(1, None, "batch"), (2, None, "example"), (3, 0.5, "batch"), (4, 2.0, "example")],
)
def test_equals_its_oracle(top_k, factor, group, masked):
    layer = layers.MoE(
        E, 5, router="expert_choice", top_k=top_k, capacity_factor=factor, capacity_group=group
    )
    layer.build((None, None, D))
    helpers.randomize_weights(layer)
    rng = np.random.default_rng(1)
    shape = (2, 6, D)
    x = rng.normal(size=shape).astype("float32")
    cotangent = rng.normal(size=shape).astype("float32")
    mask = np.arange(6) < np.array([[4], [1]]) if masked else np.ones(shape[:2], bool)
    call = {"mask": mask} if masked else {}
    (outputs, routing), _, gradients = helpers.values_and_gradients(
        layer, x, cotangent, lambda result: result[0], return_routing=True, **call
    )
    groups, size = (2, 6) if group == "example" else (1, 12)
    capacity = min(math.ceil((factor or 1.0) * top_k * size / E), size)
    weights = {name: each.astype("float64") for name, each in helpers.weights_of(layer).items()}
    arguments = (x.astype("float64").reshape(-1, D), weights, mask.reshape(-1), groups, capacity)
    expected, kept = reference(*arguments)
    np.testing.assert_array_equal(routing.kept.reshape(-1, E), kept)
    expected_gradients = slopes(*arguments, cotangent.reshape(-1, D))
    expected_gradients["inputs"] = expected_gradients["inputs"].reshape(shape)
    helpers.assert_all_close(
        {"outputs": outputs, **gradients},
        {"outputs": expected.reshape(shape), **expected_gradients},
    )


def test_loads_are_equal_and_counted():
    layer = layers.MoE(E, 5, router="expert_choice", top_k=2)
    layer.build((None, D))
    helpers.randomize_weights(layer)
    x = np.random.default_rng(0).normal(size=(64, D)).astype("float32")
    (_, routing), _ = helpers.call(layer, x, training=True, return_routing=True)
    np.testing.assert_array_equal(routing.kept.sum(axis=0), 4 * [2 * 64 // E])
    counts = layer.running_counts()
    assert (counts["assignments"], counts["dropped"]) == (2 * 64, 0)
    plan = layer.dispatch_plan(64)
    assert (plan.dispatcher, plan.overhead) == ("expert_choice", 1.0)
    assert plan.reason == "experts choose their tokens: 128 slots in all"


def test_a_bad_token_is_chosen_by_nobody():
    layer = layers.MoE(E, 5, router="expert_choice", top_k=4)
    layer.build((None, D))
    helpers.randomize_weights(layer)
    x = np.random.default_rng(0).normal(size=(8, D)).astype("float32")
    x[3] = np.nan
    (outputs, routing), _ = helpers.call(layer, x, return_routing=True)
    assert not routing.kept[3].any()
    assert np.isfinite(np.delete(outputs, 3, axis=0)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dispatch": "walk"}, "`dispatch` must be 'auto' where experts choose their tokens"),
        ({"routing_level": "example"}, "`routing_level` must be 'token' where experts choose"),
        ({"top_k": 9}, "`top_k` must be an integer between 1 and num_experts=4"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        layers.MoE(E, 5, router="expert_choice", **arguments)
