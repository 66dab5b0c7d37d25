"""Base of dispatchers that sort nothing: assignments stay where they stand."""

from typing import NamedTuple

import keras
from keras import ops

from keras_moe.core.records import Routing
from keras_moe.core.types import Size, Tensor
from keras_moe.dispatch.dispatcher import Dispatcher, kept_within


class ChoicePlacement(NamedTuple):
    """Assignments where they stand.

    Attributes:
        kept: bool `(N, k)`.
        experts: int32 `(N, k)`.
    """

    kept: Tensor
    experts: Tensor


class InPlaceDispatcher(Dispatcher):
    """Base of dispatchers that bring experts to tokens, and not tokens to experts."""

    def place(
        self, routing: Routing, num_experts: int, capacity: Size | None = None, groups: Size = 1
    ) -> ChoicePlacement:
        kept = kept_within(routing, num_experts, capacity, groups)
        return ChoicePlacement(kept, routing.experts)


def weighted_sum(values: Tensor, weights: Tensor, dtype: str) -> Tensor:
    """Sums `(k, N, out)` with weights `(k, N)` over k, in float32 at least."""
    wide = keras.backend.result_type(dtype, "float32")
    terms = ops.cast(values, wide) * ops.expand_dims(ops.cast(weights, wide), -1)
    return ops.cast(ops.sum(terms, axis=0), dtype)
