"""The walk where shapes may be dynamic: each expert multiplies exactly its own rows."""

from __future__ import annotations

from functools import partial
from typing import Any

import tensorflow as tf

from keras_moe.core.types import Tensor
from keras_moe.dispatch.backend.tensorflow.stages import (
    Experts,
    Route,
    Rows,
    Static,
    apply,
    apply_backward,
    linear,
    linear_backward,
    num_remembered,
    over_indices,
    starts_of,
    wide,
)


def forward(static: Static, tokens: Tensor, route: Route, experts: Experts) -> tuple[Tensor, Any]:
    """Returns each token's weighted sum, and what `backward` needs to remember.

    An expert's outputs are weighted while they are in the cache.
    """
    rows, num_experts = Rows(tokens, route.token_of), experts.kernels[0][0].shape[0]
    starts, dtype = starts_of(route.ends), wide(tokens.dtype)

    def body(index: Tensor, carry: Any) -> Any:
        span = slice(starts[index], route.ends[index])
        expert = _expert(experts, index, span, rows.dtype)
        hidden, sums = apply(static, expert, rows[span], linear)
        weighted = tf.cast(hidden, dtype) * tf.cast(route.weight_of[span], dtype)
        return tf.nest.map_structure(partial(_put, index), carry, (weighted, sums))

    def pieces(kernel: Tensor) -> tf.TensorArray:
        return _pieces(rows.dtype, num_experts, kernel.shape[-1])

    remembered = experts.kernels[: num_remembered(static, experts)]
    outputs = _pieces(dtype, num_experts, experts.kernels[-1][0].shape[-1])
    carry = (outputs, tf.nest.map_structure(pieces, list(remembered)))
    outputs, sums = over_indices(num_experts, body, carry)
    # Joined, since a SavedModel cannot keep a gradient that captures a `TensorArray`.
    sums = tf.nest.map_structure(lambda each: _joined(each, route), sums)
    return _summed(_joined(outputs, route), route), sums


def backward(
    static: Static,
    tokens: Tensor,
    route: Route,
    experts: Experts,
    sums: Any,
    cotangent: Tensor,
) -> tuple[Tensor, Tensor, Experts]:
    """The gradients of the tokens, of the assignments' weights, and of the experts."""
    rows, upstream = Rows(tokens, route.token_of), Rows(cotangent, route.token_of)
    starts, num_experts = starts_of(route.ends), experts.kernels[0][0].shape[0]

    def body(index: Tensor, carry: Any) -> Any:
        span = slice(starts[index], route.ends[index])
        before = tf.nest.map_structure(lambda all_: all_[span], sums)
        grad_row, grad_weight, grad_expert = apply_backward(
            static,
            _expert(experts, index, span, rows.dtype),
            rows[span],
            before,
            upstream[span],
            route.weight_of[span],
            linear_backward,
        )
        weights = tf.nest.map_structure(
            lambda all_, new: tf.cast(new, all_.dtype), experts[:2], grad_expert[:2]
        )
        new = (grad_row, grad_weight, weights, grad_expert.scales)
        return tf.nest.map_structure(partial(_put, index), carry, new)

    carry = (
        _pieces(rows.dtype, num_experts, rows.shape[-1]),
        _pieces(wide(rows.dtype), num_experts, 1),
        tf.nest.map_structure(
            lambda all_: tf.TensorArray(all_.dtype, num_experts, element_shape=all_.shape[1:]),
            experts[:2],
        ),
        tf.nest.map_structure(
            lambda all_: _pieces(all_.dtype, num_experts, all_.shape[-1]), experts.scales
        ),
    )
    grad_row, grad_weight, weights, scales = over_indices(num_experts, body, carry)
    kernels, biases = tf.nest.map_structure(lambda each: each.stack(), weights)
    grad_row, grad_weight, scales = tf.nest.map_structure(
        lambda each: _joined(each, route), (grad_row, grad_weight, scales)
    )
    grad_weights = tf.gather(grad_weight[:, 0], tf.transpose(_slot_of(route)))
    return _summed(grad_row, route), grad_weights, Experts(kernels, biases, scales)


def _slot_of(route: Route) -> Tensor:
    """The slot of each choice of each token, `(k, N)`.

    An assignment without an expert finds its zero in the last slot, which then has none either.
    """
    last = tf.shape(route.token_of)[0] - 1
    return tf.reshape(tf.minimum(route.slots.slot_of, last), [route.top_k, -1])


def _summed(rows: Tensor, route: Route) -> Tensor:
    """The sum over each token's slots, in `wide`."""
    first, *others = tf.unstack(_slot_of(route))
    rows = tf.cast(rows, wide(rows.dtype))
    total = tf.gather(rows, first)
    for chosen in others:
        with tf.control_dependencies([total]):  # at once, they would be all rows once more
            total += tf.gather(rows, chosen)
    return total


def _expert(experts: Experts, index: Tensor, span: slice, dtype: Any) -> Experts:
    kernels, biases = tf.nest.map_structure(lambda all_: tf.cast(all_[index], dtype), experts[:2])
    return Experts(
        kernels, biases, tf.nest.map_structure(lambda scale: scale[span], experts.scales)
    )


def _pieces(dtype: Any, num_experts: int, width: int) -> tf.TensorArray:
    """Room for rows of each expert, and for those of none."""
    return tf.TensorArray(
        dtype,
        num_experts + 1,
        clear_after_read=False,  # a persistent tape runs the backward pass more than once
        infer_shape=False,
        element_shape=[None, width],
    )


def _put(index: Tensor, pieces: tf.TensorArray, new: Tensor) -> tf.TensorArray:
    return pieces.write(index, new)


def _joined(pieces: tf.TensorArray, route: Route) -> Tensor:
    """The experts' pieces, and zeros for the rows of none."""
    shape = [tf.shape(route.token_of)[0] - route.ends[-1], pieces.element_shape[-1]]
    joined = pieces.write(pieces.size() - 1, tf.zeros(shape, pieces.dtype)).concat()
    return tf.ensure_shape(joined, [route.token_of.shape[0], pieces.element_shape[-1]])
