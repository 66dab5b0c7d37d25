"""One-hot einsums: the reference for everything else, and what SPMD partitioners understand."""

import keras
from keras import ops

from keras_moe.dispatch.carrier import Carrier, ExpertBank
from keras_moe.routing import Routing
from keras_moe.types import Tensor


@keras.saving.register_keras_serializable(package="keras_moe")
class EinsumCarrier(Carrier):
    """Dispatches and combines with a one-hot mask over (group, token, expert, slot).

    The mask has N E C entries of each group, so the two einsums cost as much as the experts once a
    group has about h tokens: a reference, not a fast way. It drops what `capacity` drops. A token
    that is not finite spoils its capacity group here, since 0 times NaN is NaN.

    Reference:
        Lepikhin et al. 2020, "GShard", algorithm 1.
    """

    name = "einsum"
    has_capacity = True

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
        if capacity is None:
            raise ValueError("The einsum carrier needs a `capacity_factor`. Received: None")
        num_experts, (count, top_k) = experts.num_experts, ops.shape(routing.experts)
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
        slot = ops.equal(place[..., None], ops.arange(capacity, dtype="int32"))
        slot = ops.cast(ops.logical_and(slot, fits[..., None]), tokens.dtype)  # (g, n, k, e, c)

        tokens = ops.reshape(tokens, (groups, size, tokens.shape[-1]))
        rows = ops.einsum("gnec,gnd->egcd", ops.sum(slot, axis=2), tokens)
        rows = ops.reshape(rows, (num_experts, groups * capacity, tokens.shape[-1]))
        outputs = experts(rows, training=training)
        output_dim, dtype = outputs.shape[-1], keras.backend.standardize_dtype(outputs.dtype)
        wide = keras.backend.result_type(dtype, "float32")
        outputs = ops.reshape(outputs, (num_experts, groups, capacity, output_dim))
        weights = ops.reshape(ops.cast(routing.weights, wide), (groups, size, top_k))
        combine = ops.einsum("gnkec,gnk->gnec", ops.cast(slot, wide), weights)
        sums = ops.einsum("gnec,egco->gno", combine, ops.cast(outputs, wide))
        kept = ops.reshape(ops.any(fits, axis=-1), (count, top_k))
        return ops.cast(ops.reshape(sums, (count, output_dim)), dtype), kept
