"""The walk under XLA, over blocks of static sizes.

A block may reach past the end of its expert's rows. What it writes there is overwritten by the next
expert, whose blocks begin where this one's rows end. Behind the last row there must be rows to
spare, as many as the largest block has.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import tensorflow as tf
from keras import ops
from tensorflow.compiler.tf2xla.python import xla

from keras_moe.core.types import Size, Tensor
from keras_moe.dispatch.backend.tensorflow.stages import (
    Experts,
    Route,
    Rows,
    Static,
    apply,
    apply_backward,
    linear,
    linear_backward,
    over_indices,
    starts_of,
    wide,
)
from keras_moe.dispatch.layout import rows_by_choice, slots_by_choice


def block_sizes(total: Size | None, num_experts: int) -> tuple[int, ...]:
    """Rows per block: large ones use the processor well, small ones waste less on an expert's rest.

    Args:
        total: Rows of all experts together.
        num_experts: The experts E.
    """
    if not isinstance(total, int):  # Keras traces `fit` for any batch size
        return (128, 32)
    mean = total // num_experts
    if mean >= 256:
        return (512, 128, 32)
    if mean >= 32:
        return (128, 32)
    return (32, 8) if mean >= 8 else (8,)


def forward(static: Static, tokens: Tensor, route: Route, experts: Experts) -> tuple[Tensor, Any]:
    """Returns each token's weighted sum, and what `backward` needs to remember.

    Layer by layer, since XLA runs what is elementwise on all processors outside of loops only.
    Besides, what only a backward pass needs is never dropped from a loop within a loop.
    """
    rows = Rows(tokens, route.token_of)
    outputs, sums = apply(static, experts, rows, partial(_linear, static.block_sizes, route.ends))
    of_choice = tf.unstack(tf.cast(route.weights, wide(rows.dtype)), axis=-1)
    chosen = _by_choice(outputs, route)
    result = sum(each * weight[:, None] for each, weight in zip(chosen, of_choice, strict=True))
    # A tape around a compiled function would look for the loops' own gradients, and there are none.
    return result, tf.nest.map_structure(tf.stop_gradient, sums)


def backward(
    static: Static,
    tokens: Tensor,
    route: Route,
    experts: Experts,
    sums: Any,
    cotangent: Tensor,
) -> tuple[Tensor, Tensor, Experts]:
    """The gradients of the tokens, of the assignments' weights, and of the experts."""
    grad_slot, grad_weight, grad_experts = apply_backward(
        static,
        experts,
        Rows(tokens, route.token_of),
        sums,
        Rows(cotangent, route.token_of),
        route.weight_of,
        partial(_linear_backward, static.block_sizes, route.ends),
    )
    grad_weights = tf.concat(_by_choice(grad_weight, route), axis=-1)
    return sum(_by_choice(grad_slot, route)), grad_weights, grad_experts


def _by_choice(rows: Tensor, route: Route) -> list[Tensor]:
    """The rows of every first choice, every second one and so on, in `wide`; 0 where none is kept.

    In empty slots the last block has written something.
    """
    return rows_by_choice(rows, *slots_by_choice(route.slots, route.top_k))


def _linear(
    sizes: tuple[int, ...], ends: Tensor, rows: Tensor | Rows, kernels: Any, biases: Any
) -> Any:
    def block(size: int, expert: Any, at: Tensor, end: Tensor, sums: Any) -> Any:
        return tf.nest.map_structure(
            partial(_write, at), sums, linear(_read(at, size, rows), *expert)
        )

    def over_blocks(expert: Any, index: Tensor, start: Tensor, end: Tensor, sums: Any) -> Any:
        return _over_blocks(block, sizes, expert, start, end, sums)

    sums = tuple(_zeros(each.shape[-1], ends, rows) for each in kernels)
    return _over_experts(over_blocks, ends, (kernels, biases), rows.dtype, sums)


def _linear_backward(
    sizes: tuple[int, ...],
    ends: Tensor,
    rows: Tensor | Rows,
    grad_sums: Any,
    kernels: Any,
    biases: Any,
    weight: Tensor | None,
) -> tuple[Any, Any, Any, Any]:
    weights = (kernels, biases)

    def block(size: int, expert: Any, at: Tensor, end: Tensor, carry: Any) -> Any:
        is_row = (at + tf.range(size) < end)[:, None]

        def zero_past_end(all_: Tensor | Rows) -> Tensor:
            # A product with 0 would not do: the next expert's rows may be NaN.
            return tf.where(is_row, _read(at, size, all_), tf.zeros([], all_.dtype))

        grad_rows, grad_weight_of, grad_weights = carry
        own_kernels, own_biases = expert
        grad_row, *new, grad_weight = linear_backward(
            zero_past_end(rows),
            [zero_past_end(each) for each in grad_sums],
            own_kernels,
            own_biases,
            None if weight is None else zero_past_end(weight),
        )
        if grad_weight is not None:
            grad_weight_of = _write(at, grad_weight_of, grad_weight)
        grad_weights = tf.nest.map_structure(tf.add, grad_weights, tuple(new))
        return _write(at, grad_rows, grad_row), grad_weight_of, grad_weights

    def over_blocks(expert: Any, index: Tensor, start: Tensor, end: Tensor, carry: Any) -> Any:
        *grad_slot, grad_weights = carry
        zeros = tf.nest.map_structure(
            lambda all_: tf.zeros(all_.shape[1:], wide(all_.dtype)), weights
        )
        *grad_slot, new = _over_blocks(block, sizes, expert, start, end, (*grad_slot, zeros))
        return *grad_slot, tf.nest.map_structure(
            lambda all_, new: _write(index, all_, tf.cast(new, all_.dtype)[None]), grad_weights, new
        )

    grad_weight_of = () if weight is None else tf.zeros_like(weight, wide(rows.dtype))
    carry = (
        _zeros(rows.shape[-1], ends, grad_sums[0]),
        grad_weight_of,
        tf.nest.map_structure(tf.zeros_like, weights),
    )
    grad_rows, grad_weight_of, grad_weights = _over_experts(
        over_blocks, ends, weights, rows.dtype, carry
    )
    return grad_rows, *grad_weights, None if weight is None else grad_weight_of


def _over_experts(
    step: Callable[..., Any], ends: Tensor, weights: Any, dtype: Any, carry: Any
) -> Any:
    """Folds over the experts that have rows.

    The weights of each are copied, and cast to a dtype, once and not per block.
    """
    starts = starts_of(ends)
    has_rows = ends > starts
    # Those with rows first, in order.
    busy = tf.argsort(tf.cast(tf.logical_not(has_rows), tf.int32), stable=True)

    def body(place: Tensor, carry: Any) -> Any:
        index = _slice(busy, place, 1)[0]
        start, end, *expert = tf.nest.map_structure(
            lambda all_: tf.squeeze(_slice(all_, index, 1), axis=0), (starts, ends, *weights)
        )
        expert = tf.nest.map_structure(lambda each: tf.cast(each, dtype), expert)
        return step(expert, index, start, end, carry)

    return over_indices(tf.reduce_sum(tf.cast(has_rows, tf.int32)), body, carry)


def _over_blocks(
    block: Callable[..., Any],
    sizes: tuple[int, ...],
    expert: Any,
    start: Tensor,
    end: Tensor,
    carry: Any,
) -> Any:
    """Folds over one expert's rows: large blocks while there is enough for them, then smaller."""
    state = (start, carry)
    for size in sizes:
        # A larger block is worth it if smaller ones would compute as many rows.
        least = 1 if size == sizes[-1] else size - sizes[-1] + 1

        def has_enough(at: Tensor, carry: Any, least: int = least) -> Tensor:
            return end - at >= least

        def take(at: Tensor, carry: Any, size: int = size) -> Any:
            return at + size, block(size, expert, at, end, carry)

        state = tf.while_loop(has_enough, take, state)
    return state[1]


def _read(at: Tensor, size: int, rows: Tensor | Rows) -> Tensor:
    if isinstance(rows, Rows):
        return tf.gather(rows.tokens, _slice(rows.token_of, at, size))
    return _slice(rows, at, size)


def _slice(all_: Tensor, at: Tensor, size: int) -> Tensor:
    """Some entries of the first axis.

    Not `all_[at]` nor `tf.slice`: TensorFlow compiles those anew for every value of what `at` is
    computed from, which is the whole batch.
    """
    rest = all_.shape[1:]
    return xla.dynamic_slice(all_, tf.stack([at, *[0] * len(rest)]), [size, *rest])


def _write(at: Tensor, all_: Tensor, block: Tensor) -> Tensor:
    """Writes along the first axis, in place if XLA can."""
    indices = [at, *[0] * (len(all_.shape) - 1)]
    return ops.slice_update(all_, indices, block)


def _zeros(width: int, ends: Tensor, inputs: Tensor | Rows) -> Tensor:
    """Room for what is made of `inputs`, one row per slot.

    Plain zeros of equal shapes are one array for XLA, kept from the first loop that starts with it
    to the last, and copied for each. These are zeros too, but it cannot know.
    """
    values = inputs.tokens if isinstance(inputs, Rows) else inputs
    slots = inputs.token_of if isinstance(inputs, Rows) else inputs
    zero = tf.where(ends[0] < 0, values[0, 0], tf.zeros([], values.dtype))
    return tf.fill([tf.shape(slots)[0], width], zero)
