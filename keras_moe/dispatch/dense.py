"""All experts on all tokens: right when most experts are chosen anyway."""

import keras
from keras import ops

from keras_moe.core.types import Tensor
from keras_moe.dispatch.dispatcher import ExpertBank
from keras_moe.dispatch.in_place import ChoicePlacement, InPlaceDispatcher, weighted_sum


@keras.saving.register_keras_serializable(package="keras_moe")
class DenseDispatcher(InPlaceDispatcher):
    """Runs every expert on every token and mixes: E / k times the chosen experts' FLOPs."""

    name = "dense"

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
