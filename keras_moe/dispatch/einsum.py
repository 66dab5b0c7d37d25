"""One-hot einsums: the reference for everything else, and what SPMD partitioners understand."""

from typing import NamedTuple

import keras
from keras import ops

from keras_moe.core.records import Routing
from keras_moe.core.types import Size, Tensor
from keras_moe.dispatch import backend
from keras_moe.dispatch.dispatcher import Dispatcher, ExpertBank, needed


class MaskPlacement(NamedTuple):
    """A mask of tokens, choices, experts and slots.

    Attributes:
        kept: bool `(N, k)`.
        is_in: bool `(groups, tokens, k, E, C)`.
    """

    kept: Tensor
    is_in: Tensor


@keras.saving.register_keras_serializable(package="keras_moe")
class EinsumDispatcher(Dispatcher):
    """Dispatches and combines with a one-hot mask over (group, token, expert, slot).

    The mask has N E C entries of each group, so the two einsums cost as much as the experts once a
    group has about h tokens: a reference, not a fast way. It drops what `slots` drops. A token
    that is not finite spoils its capacity group here, since 0 times NaN is NaN.

    Reference:
        Lepikhin et al. 2020, "GShard", algorithm 1.
    """

    name = "einsum"
    needs_capacity = True

    def place(
        self, routing: Routing, num_experts: int, capacity: Size | None = None, groups: Size = 1
    ) -> MaskPlacement:
        capacity = needed(capacity, self.name)
        count, top_k = ops.shape(routing.experts)
        size = count // groups
        chosen = ops.equal(routing.experts[..., None], ops.arange(num_experts, dtype="int32"))
        chosen = ops.logical_and(chosen, routing.kept[..., None])  # (N, k, E)
        chosen = ops.reshape(chosen, (groups, size, top_k, num_experts))
        # First choices of all tokens come before second choices: (g, k n, e).
        in_order = ops.transpose(chosen, (0, 2, 1, 3))
        in_order = ops.reshape(in_order, (groups, top_k * size, num_experts))
        # Counted in int32: a sum of 1000 ones is 256 in bfloat16.
        place = ops.cumsum(ops.cast(in_order, "int32"), axis=1) - 1
        place = ops.reshape(place, (groups, top_k, size, num_experts))
        place = ops.transpose(place, (0, 2, 1, 3))  # (g, n, k, e)
        fits = ops.logical_and(chosen, place < capacity)
        is_in = ops.equal(place[..., None], ops.arange(capacity, dtype="int32"))
        is_in = ops.logical_and(is_in, fits[..., None])
        return MaskPlacement(ops.reshape(ops.any(fits, axis=-1), (count, top_k)), is_in)

    def run(
        self,
        tokens: Tensor,
        weights: Tensor,
        placement: MaskPlacement,
        experts: ExpertBank,
        training: bool | None = None,
    ) -> Tensor:
        groups, size, top_k, num_experts, capacity = ops.shape(placement.is_in)
        count, width = ops.shape(tokens)[0], tokens.shape[-1]
        slot = ops.cast(placement.is_in, tokens.dtype)  # (g, n, k, e, c)
        grouped = ops.reshape(tokens, (groups, size, width))
        rows = ops.einsum("gnec,gnd->egcd", ops.sum(slot, axis=2), grouped)
        rows = ops.reshape(rows, (num_experts, groups * capacity, width))
        outputs = experts(rows, training=training)
        output_dim, dtype = outputs.shape[-1], keras.backend.standardize_dtype(outputs.dtype)
        wide = keras.backend.result_type(dtype, "float32")
        outputs = ops.reshape(outputs, (num_experts, groups, capacity, output_dim))
        weights = ops.reshape(ops.cast(weights, wide), (groups, size, top_k))
        with backend.current.without_autocast():
            combine = ops.einsum("gnkec,gnk->gnec", ops.cast(slot, wide), weights)
            sums = ops.einsum("gnec,egco->gno", combine, ops.cast(outputs, wide))
        return ops.cast(ops.reshape(sums, (count, output_dim)), dtype)
