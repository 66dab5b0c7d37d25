"""Parameters that one token meets, by hand."""

import keras
import numpy as np
import pytest

from keras_moe import layers
from keras_moe.flops.active_parameters import active_parameters

pytestmark = pytest.mark.one_backend("arithmetic on configurations")

D, H, E = 4, 10, 5
MLP = (D * H + H) + (H * D + D)


@pytest.fixture(autouse=True)
def _weights_that_cost_nothing(monkeypatch):
    """JAX compiles an initializer for every new shape; no figure here depends on a weight."""
    add_weight = keras.layers.Layer.add_weight

    def add_drawn(layer, shape=None, initializer=None, **kwargs):
        def drawn(shape, dtype=None):
            return rng.uniform(0.1, 1.0, shape).astype(dtype)

        is_count = not kwargs.get("trainable", True)
        return add_weight(layer, shape, initializer if is_count else drawn, **kwargs)

    rng = np.random.default_rng(0)
    monkeypatch.setattr(keras.layers.Layer, "add_weight", add_drawn)


def dense_experts(*units):
    return [
        keras.Sequential([keras.layers.Dense(u), keras.layers.Dense(D, use_bias=False)])
        for u in units
    ]


CASES = {
    "dense": (lambda: keras.layers.Dense(7), D * 7 + 7),
    "moe": (lambda: layers.MoE(E, H, top_k=2), D * E + 2 * MLP),
    "moe, dense router": (lambda: layers.MoE(E, H, router="dense"), D * E + E * MLP),
    "moe, shared experts": (
        lambda: layers.MoE(E, H, top_k=3, num_shared_experts=2),
        D * E + (3 + 2) * MLP,
    ),
    "moe, glu": (
        lambda: layers.MoE(E, H, experts="glu", use_bias=False),
        D * E + 2 * 3 * D * H,
    ),
    "moe, layers": (
        lambda: layers.MoE(3, top_k=2, experts=dense_experts(5, 5, 5)),
        D * 3 + 2 * (D * 5 + 5 + 5 * D),
    ),
    "moe, unequal layers": (  # 2/3 of 9 + 18 + 36 weights
        lambda: layers.MoE(3, top_k=2, experts=dense_experts(1, 2, 4)),
        D * 3 + 42,
    ),
    "moe, rounded": (  # 1/2 of 9 + 18 weights, to even as Python does
        lambda: layers.MoE(2, top_k=1, experts=dense_experts(1, 2)),
        round(D * 2 + 13.5),
    ),
    "moe of moe": (  # 1/2 of two times (router + 2/5 of five experts)
        lambda: layers.MoE(2, top_k=1, experts=[layers.MoE(E, H, top_k=2) for _ in range(2)]),
        D * 2 + D * E + 2 * MLP,
    ),
    "switch": (lambda: layers.SwitchFFN(E, H), D * E + MLP),
    "soft moe": (lambda: layers.SoftMoE(E, H, slots_per_expert=3), D * E * 3 + 1 + E * MLP),
    "mmoe": (
        lambda: layers.MMoE(E, H, tasks=3, gate_units=[6]),
        E * (D * H + H) + 3 * (D * 6 + 6) + 3 * 6 * E,
    ),
    "batch norm": (keras.layers.BatchNormalization, 2 * D),
    "seeds": (lambda: keras.layers.Dropout(0.5, seed=1), 0),
}


@pytest.mark.parametrize("case", CASES)
def test_by_hand_and_frozen_the_same(case):
    make, expected = CASES[case]
    layer = make()
    if not layer.built:
        layer.build((None, 6, D))
    assert active_parameters(layer) == expected
    layer.trainable = False
    assert active_parameters(layer) == expected


@pytest.mark.parametrize(
    "make", [lambda k: layers.MoE(k, H, top_k=k), lambda k: layers.MMoE(k, H, 2)]
)
def test_all_chosen_is_all_that_trains(make):
    layer = make(3)
    layer.build((None, D))
    assert active_parameters(layer) == sum(v.numpy().size for v in layer.trainable_variables)


def test_shared_weights_count_once():
    x, y = keras.Input((D,)), keras.Input((D,))
    dense, moe = keras.layers.Dense(D), layers.MoE(E, H)
    first = keras.Model(x, moe(dense(x)))
    z = moe(dense(dense(first(y))))
    assert active_parameters(keras.Model(y, z)) == D * D + D + D * E + 2 * MLP


def test_a_subclassed_model_counts_what_it_holds():
    class Ranker(keras.Model):
        def __init__(self):
            super().__init__()
            self.trunk = [layers.MoE(E, H), keras.layers.Dense(2)]

        def build(self, shape):
            self.trunk[0].build(shape)
            self.trunk[1].build(shape)

    model = Ranker()
    with pytest.raises(ValueError, match=r"`model` must be built: call it once. Received: model="):
        active_parameters(model)
    model.build((None, D))
    assert active_parameters(model) == D * E + 2 * MLP + D * 2 + 2
