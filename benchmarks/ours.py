"""Our layers, configured for the table, with the routing under control."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np

from benchmarks.contender import OURS, Contender
from benchmarks.controlled_routing import copying_kernel
from benchmarks.references import GLU_ACTIVATION
from benchmarks.rows import Sizes
from keras_moe.layers import MoE

# `MoE(dispatch=)` takes these with a capacity factor, and the others without one.
CAPACITY_DISPATCHERS = ("slots", "einsum")


def moe(sizes: Sizes, **arguments: Any) -> keras.Layer:
    """A built `MoE` whose router reads its logits off the inputs."""
    layer = MoE(sizes.experts, sizes.hidden, top_k=sizes.top_k, **arguments)
    layer.build((None, sizes.width))
    layer.router.kernel.assign(copying_kernel(sizes.width, sizes.experts))
    return layer


def glu_moe(sizes: Sizes, **arguments: Any) -> keras.Layer:
    """The same with the experts of Mixtral: gated, silu, no biases."""
    return moe(sizes, experts="glu", use_bias=False, activation=GLU_ACTIVATION, **arguments)


def name_with(dispatcher: str) -> str:
    """The name of our layer with a dispatcher in the table."""
    return OURS if dispatcher == "auto" else f"{OURS}[{dispatcher}]"


def dispatchers_for(asked: Sequence[str], capacity_factor: float | None) -> list[str]:
    """The requested dispatchers that work with this capacity factor."""
    has_capacity = capacity_factor is not None
    return [
        name for name in asked if name == "auto" or (name in CAPACITY_DISPATCHERS) == has_capacity
    ]


def contenders(
    sizes: Sizes, inputs: np.ndarray, asked: Sequence[str], capacity_factor: float | None
) -> list[Contender]:
    """Our layer, once per dispatcher."""

    def with_dispatcher(dispatcher: str) -> Contender:
        return Contender(
            name_with(dispatcher),
            lambda: moe(sizes, capacity_factor=capacity_factor, dispatch=dispatcher),
            inputs,
        )

    return [with_dispatcher(dispatcher) for dispatcher in dispatchers_for(asked, capacity_factor)]


def plan_facts(sizes: Sizes, capacity_factor: float | None) -> dict[str, Any]:
    """The layer's dispatch plan for these tokens, in either pass."""
    layer = MoE(sizes.experts, sizes.hidden, top_k=sizes.top_k, capacity_factor=capacity_factor)
    layer.build((None, sizes.width))
    plans = {
        which: layer.dispatch_plan(sizes.tokens, training=training)
        for which, training in (("forward", False), ("gradient", True))
    }
    return {
        "dispatcher": {which: plan.dispatcher for which, plan in plans.items()},
        "predicted": {which: float(plan.overhead) for which, plan in plans.items()},
    }
