"""Capacity both ways, in slots and as a walk over what is kept: the same drops and gradients."""

import itertools
import math
from fractions import Fraction

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe import layers
from keras_moe.core.numerics import slots_per_expert
from keras_moe.dispatch import WalkDispatcher, backend, choose, costs
from tests import helpers
from tests.contract import run
from tests.helpers import some_everywhere

SLOTS, WALK = float("inf"), 0.0


@pytest.fixture
def taken(monkeypatch):
    """How often the walk was taken."""
    calls = []
    place = WalkDispatcher.place

    def spy(self, *args, **kwargs):
        calls.append(self.name)
        return place(self, *args, **kwargs)

    monkeypatch.setattr(WalkDispatcher, "place", spy)
    return calls


def prefer(monkeypatch, least):
    monkeypatch.setitem(costs._WALK_FROM, keras.backend.backend(), least)


BOTH_WAYS = list(itertools.product([0.3, 0.7, 2.0], ["batch", "example"], ["mlp", "glu"]))
# Each factor, group and kind of experts, with some of the others.
EVERYWHERE = [(0.3, "example", "mlp"), (0.7, "batch", "glu"), (0.7, "example", "glu")]
EVERYWHERE += [(2.0, "batch", "mlp")]


@pytest.mark.parametrize(
    ("factor", "group", "experts"),
    some_everywhere(
        {"-".join(map(str, each)): each for each in BOTH_WAYS},
        ["-".join(map(str, each)) for each in EVERYWHERE],
        "drops do not know the experts",
    ),
)
def test_both_ways_agree(monkeypatch, taken, factor, group, experts):
    layer = layers.MoE(5, 7, top_k=2, capacity_factor=factor, capacity_group=group, experts=experts)
    layer.build((None, None, 4))
    helpers.randomize_weights(layer)
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, 50, 4)).astype("float32")
    mask = rng.random(size=(3, 50)) < 0.8
    cotangent = rng.normal(size=x.shape).astype("float32")
    results = []
    for least in (SLOTS, WALK):
        prefer(monkeypatch, least)
        (outputs, routing), losses, gradients = helpers.values_and_gradients(
            layer, x, cotangent, lambda result: result[0], mask=mask, return_routing=True
        )
        results.append((routing.kept, {"outputs": outputs, "losses": losses, **gradients}))
        assert bool(taken) == (least == WALK)
    (kept_in_slots, in_slots), (kept_by_walk, by_walk) = results
    np.testing.assert_array_equal(kept_by_walk, kept_in_slots)
    assert factor >= 2.0 or not kept_in_slots[mask].all()  # something was dropped
    helpers.assert_all_close(by_walk, in_slots)


DISPATCHED = {
    f"{dispatch}-{group}": (dispatch, group)
    for dispatch in sorted(choose.DISPATCHERS)
    for group in ("batch", "example")
}
# Drops of an example have their own path where there are slots, and in einsums.
DROPS = [name for name in DISPATCHED if name.endswith("batch")] + ["slots-example", "walk-example"]


@pytest.mark.parametrize(
    ("dispatch", "group"), some_everywhere(DISPATCHED, DROPS, "the same drops, met with others")
)
def test_every_dispatcher_drops_the_same(dispatch, group):
    """And is in a config by its name."""
    layer = layers.MoE(
        5, 7, top_k=2, capacity_factor=0.5, capacity_group=group, dispatch=dispatch, name="one"
    )
    assert layer.get_config()["dispatch"] == dispatch
    reference = layers.MoE.from_config({**layer.get_config(), "dispatch": "einsum"})
    rng = np.random.default_rng(0)
    x, cotangent = (rng.normal(size=(3, 9, 4)).astype("float32") for _ in range(2))
    mask = rng.random(size=(3, 9)) < 0.8
    found = []
    for each in (layer, reference):
        each.build((None, None, 4))
        helpers.randomize_weights(each)
        if dispatch == "grouped" and keras.backend.backend() == "tensorflow":
            pytest.skip("TensorFlow has no grouped matmul")
        (outputs, routing), losses, gradients = helpers.values_and_gradients(
            each, x, cotangent, lambda result: result[0], mask=mask, return_routing=True
        )
        found.append((routing.kept, {"outputs": outputs, "losses": losses, **gradients}))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    assert not found[1][0][mask].all()  # something was dropped
    helpers.assert_all_close(found[0][1], found[1][1])


@pytest.mark.parametrize("factor", [1.0, 2.0, 4.0])
@pytest.mark.parametrize(
    "is_built", some_everywhere({"False": False, "True": True}, ["True"], "a choice in Python")
)
def test_the_plan_is_what_a_call_takes(taken, factor, is_built):
    layer = layers.MoE(8, 8, capacity_factor=factor)
    if is_built:
        layer.build((None, 4))
    plan = layer.dispatch_plan(64, training=False)
    run(layer, np.ones((64, 4), "float32"))
    assert (plan.dispatcher == "walk") == bool(taken)


@pytest.mark.parametrize(
    ("factor", "experts"), [(4.0, None), (1.0, None), (4.0, keras.layers.Dense(4))]
)
def test_which_way_is_taken(taken, factor, experts):
    """Where most slots would stay empty a bank walks; Keras layers, of unknown cost, never do."""
    arguments = {"hidden_dim": 8} if experts is None else {"experts": experts}
    run(layers.MoE(8, capacity_factor=factor, **arguments), np.ones((64, 4), "float32"))
    walks = experts is None and (factor == 4.0 or keras.backend.backend() == "torch")
    assert bool(taken) == walks


def test_an_accelerator_takes_slots(monkeypatch, taken):
    monkeypatch.setattr(backend.current, "is_on_cpu", lambda tensor: False)
    run(layers.MoE(8, 8, capacity_factor=4.0), np.ones((64, 4), "float32"))
    assert not taken


def test_by_hand(monkeypatch):
    monkeypatch.setitem(costs._WALK_FROM, keras.backend.backend(), 1.5)
    monkeypatch.setitem(costs._LARGE, keras.backend.backend(), 1000.0)
    assert not costs.walk_beats_slots(100, 149, num_experts=4, weights=4)
    assert costs.walk_beats_slots(100, 150, num_experts=4, weights=4)
    assert not costs.walk_beats_slots(100, 100, num_experts=4, weights=159)  # 25 rows, 39.75 each
    assert costs.walk_beats_slots(100, 100, num_experts=4, weights=160)
    assert not costs.walk_beats_slots(100, 50, num_experts=4, weights=160)  # half are dropped
    unknown = ops.shape(ops.ones((3,)))[0] + ops.ones((), dtype="int32")
    assert not costs.walk_beats_slots(unknown, unknown, num_experts=4, weights=10**9)


def test_large_experts_walk_on_jax(taken):
    """64 rows for each of 8 experts of 2 x 1024 x 1024 weights: 1.3e8 multiply-adds."""
    run(layers.MoE(8, 1024, capacity_factor=1.0), np.ones((256, 1024), "float32"))
    assert bool(taken) == (keras.backend.backend() in ("jax", "torch"))


@settings(deadline=None)
@given(
    factor=st.integers(1, 400),
    top_k=st.integers(1, 8),
    num_experts=st.integers(1, 96),
    count=st.integers(0, 100_000),
)
def test_slots_are_rounded_up_exactly(factor, top_k, num_experts, count):
    """Of a number as of a tensor: 1.1 * 10 / 11 is above 1 in floating point."""
    per_token = Fraction(factor * top_k, 100 * num_experts)
    expected = min(math.ceil(per_token * count), count)
    assert slots_per_expert(float(per_token), count) == expected
    of_tensor = slots_per_expert(float(per_token), ops.convert_to_tensor(np.int32(count)))
    assert int(of_tensor) == expected
