"""All experts on all tokens: right when most experts are chosen anyway."""

from typing import NamedTuple

import keras
from keras import ops

from keras_moe.core.records import Routing
from keras_moe.core.types import Tensor
from keras_moe.dispatch.dispatcher import Dispatcher, ExpertBank, kept_within, weighted_sum


class ChoicePlacement(NamedTuple):
    """Assignments where they stand.

    Attributes:
        kept: bool `(N, k)`.
        experts: int32 `(N, k)`.
    """

    kept: Tensor
    experts: Tensor


@keras.saving.register_keras_serializable(package="keras_moe")
class DenseDispatcher(Dispatcher):
    """Runs every expert on every token and mixes: E / k times the chosen experts' FLOPs."""

    name = "dense"

    def place(
        self,
        routing: Routing,
        num_experts: int,
        capacity: int | Tensor | None = None,
        groups: int | Tensor = 1,
    ) -> ChoicePlacement:
        kept = kept_within(routing, num_experts, capacity, groups)
        return ChoicePlacement(kept, routing.experts)

    def run(
        self,
        tokens: Tensor,
        weights: Tensor,
        placement: ChoicePlacement,
        experts: ExpertBank,
        training: bool | None = None,
    ) -> Tensor:
        outputs = experts(ops.expand_dims(tokens, 0), training=training)
        every_expert = ops.arange(experts.num_experts, dtype="int32")[:, None, None]
        is_chosen = ops.equal(ops.expand_dims(placement.experts, 0), every_expert)  # (E, N, k)
        is_chosen = ops.logical_and(is_chosen, ops.expand_dims(placement.kept, 0))
        weights = ops.sum(ops.where(is_chosen, ops.expand_dims(weights, 0), 0.0), axis=-1)
        # An expert that overflows must not reach the tokens that did not choose it: Inf times 0.
        is_read = ops.expand_dims(ops.any(is_chosen, axis=-1), -1)
        outputs = ops.where(is_read, outputs, ops.zeros_like(outputs))
        dtype = keras.backend.standardize_dtype(outputs.dtype)
        return weighted_sum(outputs, weights, dtype)
