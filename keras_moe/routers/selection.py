"""Choosing the k best experts, the same ones on every backend."""

from keras import ops

from keras_moe.types import Tensor

_LOWEST = -3.4e38  # above -inf, which marks what was already taken


def select_top_k(scores: Tensor, top_k: int) -> Tensor:
    """Indices of the k largest scores of each row, best first, ties to the lowest index.

    `ops.top_k` breaks ties in an arbitrary order on torch, and its JAX lowering exports a
    SavedModel that TensorFlow cannot load; k rounds of `argmax` do neither. A NaN never wins, so
    the chosen experts of a row are always distinct and in range.

    Args:
        scores: float32 `(N, E)`.
        top_k: how many to choose.

    Returns:
        int32 `(N, k)`.
    """
    num_experts = scores.shape[-1]
    scores = ops.stop_gradient(scores)
    remaining = ops.where(ops.isfinite(scores), scores, ops.full_like(scores, _LOWEST))
    columns = ops.arange(num_experts, dtype="int32")
    chosen = []
    for _ in range(top_k):
        best = ops.cast(ops.argmax(remaining, axis=-1), "int32")
        chosen.append(best)
        taken = ops.equal(ops.expand_dims(best, -1), columns)
        remaining = ops.where(taken, ops.full_like(remaining, -float("inf")), remaining)
    return ops.stack(chosen, axis=-1)
