"""The parts of a sparse layer, router and experts, each alone over a dense layer.

The experts alone are a batched matmul on rows that are sorted already, as many for each expert: the
floor of a dispatcher built on that matmul. What is left of the whole layer's time is sorting,
gathering and summing.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from benchmarks import ours, references
from benchmarks.contender import DENSE, Case, Comparison, Contender, Options
from benchmarks.controlled_routing import even_shares, load_facts, routed_inputs
from benchmarks.rows import PASSES, Row, Sizes
from keras_moe.layers import ExpertMLP

ROUTER = "router alone"
EXPERTS = "experts alone, rows sorted"


class RouterAlone(keras.layers.Layer):
    """The router of a `MoE` with its losses, and no experts."""

    def __init__(self, moe: keras.Layer, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.router = moe.router
        self.built = True

    def call(self, inputs: Any, training: bool | None = None) -> Any:
        routing = self.router(inputs, training=training)
        for name, weight in self.router.loss_weights.items():
            self.add_loss(weight * routing.losses[name])
        return routing.weights


def case(row: Row, options: Options) -> Case:
    """Ours, its router and its experts / dense."""
    sizes = row.sizes
    inputs = routed_inputs(sizes, even_shares(sizes.experts))
    active = sizes.top_k * sizes.hidden
    layers = ours.contenders(sizes, inputs, options.dispatchers, row.capacity_factor)
    parts = [
        Contender(ROUTER, lambda: RouterAlone(ours.moe(sizes)), inputs),
        Contender(EXPERTS, lambda: _bank(sizes), _sorted_rows(sizes)),
    ]
    dense = Contender(DENSE, lambda: references.dense_ffn(sizes.width, active), inputs)
    comparisons = [Comparison(part.name, DENSE) for part in [*layers, *parts]]
    facts = {**load_facts(inputs, sizes), **ours.plan_facts(sizes, row.capacity_factor)}
    return Case([*layers, *parts, dense], comparisons, PASSES, facts)


def _bank(sizes: Sizes) -> keras.Layer:
    bank = ExpertMLP(sizes.experts, (sizes.hidden, sizes.width), references.ACTIVATION)
    bank.build((sizes.experts, None, sizes.width))
    return bank


def _sorted_rows(sizes: Sizes) -> np.ndarray:
    """As many rows for each expert as it has on average, `(E, k T / E, d)`."""
    rows = max(sizes.top_k * sizes.tokens // sizes.experts, 1)
    rng = np.random.default_rng(0)
    return rng.normal(size=(sizes.experts, rows, sizes.width)).astype("float32")
