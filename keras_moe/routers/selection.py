"""Choosing the k best experts, the same ones on every backend, and what they weigh."""

from keras import ops

from keras_moe.core.exporting import is_exporting
from keras_moe.core.numerics import LOWEST
from keras_moe.core.types import Tensor
from keras_moe.dispatch import backend

_TAKEN = -3.4028e38  # float32 has nothing much below
_LEAST = 1e-20


def select_top_k(scores: Tensor, top_k: int) -> Tensor:
    """Indices of the k largest scores of each row, best first, ties to the lowest index.

    `ops.top_k` breaks ties in an arbitrary order on torch, and its JAX lowering exports a
    SavedModel that TensorFlow cannot load; k rounds of a maximum do neither. A NaN never wins, so
    the chosen experts of a row are always distinct and in range.

    Args:
        scores: float32 `(N, E)`.
        top_k: how many to choose.

    Returns:
        int32 `(N, k)`.
    """
    if scores.shape[0] == 0:  # torch has no maximum of nothing
        return ops.zeros((0, top_k), dtype="int32")
    # Experts first: a maximum over the leading axis is elementwise over tokens, which vectorizes;
    # over the last axis, or by `argmax`, XLA:CPU takes 3 to 5 times as long.
    remaining = ops.transpose(ops.stop_gradient(scores))
    lowest = ops.full_like(remaining, LOWEST)
    remaining = ops.where(ops.isfinite(remaining), ops.maximum(remaining, lowest), lowest)
    num_experts = scores.shape[-1]
    experts = ops.expand_dims(ops.arange(num_experts, dtype="int32"), -1)
    chosen = []
    for _ in range(top_k):
        is_best = ops.equal(remaining, ops.max(remaining, axis=0, keepdims=True))
        best = ops.min(ops.where(is_best, experts, num_experts), axis=0)  # the lowest index of ties
        chosen.append(best)
        taken = ops.equal(experts, best)
        remaining = ops.where(taken, ops.full_like(remaining, _TAKEN), remaining)
    return ops.stack(chosen, axis=-1)


def pick(values: Tensor, places: Tensor) -> Tensor:
    """The entries `(N, k)` of each row of `values (N, E)` at its `places (N, k)`."""
    if not is_exporting():
        return ops.take_along_axis(values, places, axis=-1)
    # Of all entries one: ONNX and OpenVINO do not take PyTorch's indexing along an axis.
    columns = ops.arange(values.shape[-1], dtype="int32")
    is_meant = ops.equal(ops.expand_dims(places, -1), columns)
    candidates = ops.expand_dims(values, 1)
    picked = ops.sum(ops.where(is_meant, candidates, ops.zeros_like(candidates)), axis=-1)
    return ops.cast(picked, values.dtype)


def load_of(experts: Tensor, is_taken: Tensor, num_experts: int) -> Tensor:
    """Number of tokens that take each expert, float32 `(E,)`.

    Args:
        experts: int32 `(N, k)`.
        is_taken: bool `(N, k)`.
        num_experts: the experts E.
    """
    taken = ops.cast(is_taken, "float32")
    if is_exporting():  # no export format of PyTorch adds up segments
        return ops.sum(spread(taken, experts, num_experts), axis=0)
    return backend.current.segment_sum(
        ops.reshape(taken, (-1,)), ops.reshape(experts, (-1,)), num_segments=num_experts
    )


def all_experts(scores: Tensor) -> Tensor:
    """All experts, for every row of `(N, E)` scores, int32 `(N, E)`."""
    return ops.arange(scores.shape[-1], dtype="int32") + ops.zeros_like(scores, dtype="int32")


def scaled_to_one(weights: Tensor) -> Tensor:
    """Divides non-negative weights by their sum over the last axis; all 0 where all are.

    A bound and not a constant added to the sum: with one, small weights would sum to less than 1
    and a router could lower its losses by lowering all of its scores (Megatron).
    """
    if 0 in tuple(weights.shape):  # torch has no maximum of nothing
        return weights
    # First by the largest, which changes nothing: the gradient of a quotient divides by the square
    # of the sum, and the square of 1e-20 is 0.
    largest = ops.stop_gradient(ops.max(weights, axis=-1, keepdims=True))
    weights = weights / ops.maximum(largest, _LEAST)
    # The sum is at least 1 now, or below 0.5 where all underflow: gradients halve at a bound.
    return weights / ops.maximum(ops.sum(weights, axis=-1, keepdims=True), 0.5)


def spread(weights: Tensor, experts: Tensor, num_experts: int) -> Tensor:
    """The weights of the chosen experts `(N, k)` among all, `(N, E)`: 0 for the others."""
    is_chosen = ops.equal(ops.expand_dims(experts, -1), ops.arange(num_experts, dtype="int32"))
    weights = ops.expand_dims(weights, -1)
    return ops.sum(ops.where(is_chosen, weights, ops.zeros_like(weights)), axis=1)
