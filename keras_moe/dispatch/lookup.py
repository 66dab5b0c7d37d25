"""Few tokens: take the weights to the tokens."""

import keras
from keras import ops

from keras_moe.core.types import Tensor
from keras_moe.dispatch.dispatcher import ExpertBank
from keras_moe.dispatch.in_place import ChoicePlacement, InPlaceDispatcher, weighted_sum


@keras.saving.register_keras_serializable(package="keras_moe")
class LookupDispatcher(InPlaceDispatcher):
    """Gathers the weights of each token's experts: no sorting, and a copy of an expert per row.

    For decoding, where there are fewer assignments than experts. The copies are 2 k N d h numbers,
    and automatic differentiation keeps them for the backward pass.
    """

    name = "lookup"

    def run(
        self,
        tokens: Tensor,
        weights: Tensor,
        placement: ChoicePlacement,
        experts: ExpertBank,
        training: bool | None = None,
    ) -> Tensor:
        count, top_k = ops.shape(tokens)[0], weights.shape[-1]
        rows = ops.tile(ops.expand_dims(tokens, 1), (top_k, 1, 1))  # choice-major
        chosen = ops.reshape(ops.transpose(placement.experts), (-1,))
        outputs = experts(rows, block_experts=chosen, training=training)
        outputs = ops.reshape(outputs, (top_k, count, outputs.shape[-1]))
        # Padding's expert may give anything, and NaN times 0 is NaN.
        is_kept = ops.expand_dims(ops.transpose(placement.kept), -1)
        outputs = ops.where(is_kept, outputs, ops.zeros_like(outputs))
        dtype = keras.backend.standardize_dtype(outputs.dtype)
        return weighted_sum(outputs, ops.transpose(weights), dtype)
