"""Few tokens: take the weights to the tokens."""

import keras
from keras import ops

from keras_moe.dispatch.carrier import Carrier, ExpertBank, weighted_sum
from keras_moe.routing import Routing
from keras_moe.types import Tensor


@keras.saving.register_keras_serializable(package="keras_moe")
class LookupCarrier(Carrier):
    """Gathers the weights of each token's experts: no sorting, and a copy of an expert per row.

    For decoding, where there are fewer assignments than experts. The copies are 2 k N d h numbers,
    and automatic differentiation keeps them for the backward pass.
    """

    name = "lookup"

    def __call__(
        self,
        tokens: Tensor,
        routing: Routing,
        experts: ExpertBank,
        *,
        capacity: int | Tensor | None = None,
        groups: int | Tensor = 1,
        training: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        del capacity, groups
        count, top_k = ops.shape(tokens)[0], routing.experts.shape[-1]
        rows = ops.tile(ops.expand_dims(tokens, 1), (top_k, 1, 1))  # choice-major
        chosen = ops.reshape(ops.transpose(routing.experts), (-1,))
        outputs = experts(rows, block_experts=chosen, training=training)
        outputs = ops.reshape(outputs, (top_k, count, outputs.shape[-1]))
        is_kept = ops.transpose(routing.kept)
        # Padding's expert may give anything, and NaN times 0 is NaN.
        outputs = ops.where(is_kept[..., None], outputs, ops.zeros_like(outputs))
        dtype = keras.backend.standardize_dtype(outputs.dtype)
        return weighted_sum(outputs, ops.transpose(routing.weights), dtype), routing.kept
