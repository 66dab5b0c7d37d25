"""Moving rows to slots and back by gathers alone, in both directions.

Automatic differentiation turns a gather into a scatter, which adds row by row and, on a GPU, in any
order. But who reads which row is known: a slot holds one assignment, and a token is in at most k
slots. So both gradients are gathers too, and deterministic.
"""

from collections.abc import Callable

from keras import ops

from keras_moe.core.exporting import is_exporting
from keras_moe.core.sizes import as_tensor, at_least
from keras_moe.core.types import Size, Tensor
from keras_moe.dispatch import backend
from keras_moe.dispatch.layout import (
    Slots,
    rows_by_choice,
    slots_by_choice,
    take_rows,
    wide_dtype,
)


def gather_blocks(tokens: Tensor, slots: Slots, top_k: int, shape: tuple[Size, Size]) -> Tensor:
    """The tokens in slots that are blocks of rows, `(N, d) -> (blocks, rows, d)`.

    Args:
        tokens: `(N, d)`.
        slots: who is in which slot.
        top_k: choices per token.
        shape: how many blocks there are, and rows in each.
    """
    if is_exporting():  # PyTorch splits an axis of unknown size while it has no other
        return take_rows(tokens, ops.reshape(_token_of(tokens, slots), shape))
    rows = gather_tokens(tokens, slots, top_k)
    return ops.reshape(rows, (*shape, tokens.shape[-1]))


def gather_tokens(tokens: Tensor, slots: Slots, top_k: int) -> Tensor:
    """The token in every slot, `(N, d) -> (S, d)`.

    An empty slot holds a copy of some token that was routed, and nobody reads what comes of it. A
    row of zeros would be read by nobody either, but an expert with no gradient at zero (a norm)
    would turn the zero cotangent into NaN.
    """
    count = ops.shape(tokens)[0]
    if isinstance(count, int) and count == 0:
        return ops.zeros((ops.shape(slots.assignment)[0], tokens.shape[-1]), dtype=tokens.dtype)
    token = _token_of(tokens, slots)
    source, is_kept = slots_by_choice(slots, top_k)
    return _with_gradient(_gather, _gather_gradient, (tokens,), (token, source, is_kept))


def _token_of(tokens: Tensor, slots: Slots) -> Tensor:
    """The token in every slot, int32 `(S,)`; in an empty one, some token that was routed."""
    total = ops.shape(slots.slot_of)[0]
    filler = ops.min(slots.assignment, initial=as_tensor(total - 1, "int32"))
    assignment = ops.where(slots.assignment < total, slots.assignment, filler)
    return assignment % at_least(ops.shape(tokens)[0], 1)


def combine(outputs: Tensor, slots: Slots, weights: Tensor) -> Tensor:
    """Brings the slots' outputs back to their tokens and sums them, weighted.

    Args:
        outputs: `(S, out)`.
        slots: who is in which slot.
        weights: `(N, k)`, the weight of each assignment.

    Returns:
        The sums `(N, out)`, taken in float32 at least.
    """
    top_k = weights.shape[-1]
    total = ops.shape(slots.slot_of)[0]
    source, is_kept = slots_by_choice(slots, top_k)
    if isinstance(total, int) and total == 0:
        return outputs[:0]
    is_filled = slots.assignment < total
    assignment = ops.where(is_filled, slots.assignment, 0)
    token = assignment % at_least(total // top_k, 1)
    return _with_gradient(
        _combine,
        _combine_gradient,
        (outputs, weights),
        (token, assignment, is_filled, source, is_kept),
    )


def as_rows(blocks: Tensor) -> Tensor:
    """Rows in groups, `(groups, rows, width)`, as `(S, width)`."""
    width = blocks.shape[-1]
    if is_exporting():  # PyTorch joins axes of unknown sizes all at once or not at all
        blocks = ops.reshape(blocks, (-1,))
    return ops.reshape(blocks, (-1, width))


def _gather(tokens: Tensor, token: Tensor, source: Tensor, is_kept: Tensor) -> Tensor:
    return take_rows(tokens, token)


def _gather_gradient(
    upstream: Tensor, tokens: Tensor, token: Tensor, source: Tensor, is_kept: Tensor
) -> tuple[Tensor]:
    return (ops.cast(sum(rows_by_choice(upstream, source, is_kept)), tokens.dtype),)


def _combine(
    outputs: Tensor,
    weights: Tensor,
    token: Tensor,
    assignment: Tensor,
    is_filled: Tensor,
    source: Tensor,
    is_kept: Tensor,
) -> Tensor:
    of_choice = ops.unstack(ops.cast(weights, wide_dtype(outputs)), weights.shape[-1], axis=-1)
    sums = sum(
        chosen * ops.expand_dims(weight, -1)
        for chosen, weight in zip(rows_by_choice(outputs, source, is_kept), of_choice, strict=True)
    )
    return ops.cast(sums, outputs.dtype)


def _combine_gradient(
    upstream: Tensor,
    outputs: Tensor,
    weights: Tensor,
    token: Tensor,
    assignment: Tensor,
    is_filled: Tensor,
    source: Tensor,
    is_kept: Tensor,
) -> tuple[Tensor, Tensor]:
    wide = wide_dtype(outputs)
    of_slot = ops.take(ops.reshape(ops.transpose(weights), (-1,)), assignment)
    of_slot = ops.cast(ops.where(is_filled, of_slot, 0), wide)
    grad_outputs = ops.cast(take_rows(upstream, token), wide) * ops.expand_dims(of_slot, -1)
    grad_weights = [
        ops.sum(chosen * ops.cast(upstream, wide), axis=-1)
        for chosen in rows_by_choice(outputs, source, is_kept)
    ]
    return (
        ops.cast(grad_outputs, outputs.dtype),
        ops.cast(ops.stack(grad_weights, axis=-1), weights.dtype),
    )


def _with_gradient(
    function: Callable[..., Tensor],
    gradient: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    fixed: tuple[Tensor, ...],
) -> Tensor:
    """function(*inputs, *fixed), with gradient(upstream, *inputs, *fixed) to the inputs."""
    if is_exporting():  # an export has no gradients, and PyTorch's ONNX none of its functions
        return function(*inputs, *fixed)
    return backend.current.with_gradient(function, gradient, inputs, fixed)
