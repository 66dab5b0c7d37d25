"""The layers of the experts and their gradients, whatever runs them on whichever rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import tensorflow as tf

from keras_moe.core.types import Size, Tensor
from keras_moe.dispatch.layout import Slots


class Static(NamedTuple):
    """Settings that a walk is traced for."""

    activations: tuple[Callable[..., Tensor] | None, ...]
    block_sizes: tuple[int, ...]  # the largest first; each is a loop of its own


class Experts(NamedTuple):
    """The tensors of the layers: of all experts, of one expert, or of their gradients.

    The scales are always of the rows at hand. A missing one is an empty tuple: TensorFlow's trees
    take None for a leaf.
    """

    kernels: tuple[tuple[Tensor, ...], ...]
    biases: tuple[tuple[Tensor, ...], ...]
    scales: tuple[tuple[Tensor, ...], ...]


class Route(NamedTuple):
    """Assignments: who goes where.

    Attributes:
        slots: the assignments in their slots, S of them, by expert.
        token_of: int32 `(S,)`, the token in each slot; of an empty one, some.
        ends: int32 `(E,)`, where each expert's slots end.
        weights: `(N, k)`, the weight of each assignment.
        weight_of: `(S, 1)`, the weight of that in each slot; of an empty one, some.
    """

    slots: Slots
    token_of: Tensor
    ends: Tensor
    weights: Tensor
    weight_of: Tensor

    @property
    def top_k(self) -> int:
        """Experts per token."""
        return int(self.weights.shape[-1])


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of slots, which are gathered from their tokens when they are read.

    Attributes:
        tokens: `(N, width)`.
        token_of: int32 `(S,)`, the token in each slot.
    """

    tokens: Tensor
    token_of: Tensor

    @property
    def dtype(self) -> Any:
        """The dtype of the rows."""
        return self.tokens.dtype

    @property
    def shape(self) -> tuple[int | None, int]:
        """The shape of all rows, `(S, width)`."""
        return self.token_of.shape[0], self.tokens.shape[-1]

    def __getitem__(self, slots: Any) -> Tensor:
        """The rows of a slice of slots."""
        return tf.gather(self.tokens, self.token_of[slots])


def apply(
    static: Static, experts: Experts, rows: Tensor | Rows, linear: Callable[..., Any]
) -> tuple[Tensor, list[Any]]:
    """Runs the layers.

    Args:
        static: what the walk is traced for.
        experts: the weights that `linear` takes.
        rows: the rows of all slots or of some.
        linear: `linear(rows, kernels, biases)`, one layer.

    Returns:
        The outputs and, as far as a backward pass needs it, what was activated.
    """
    hidden, sums = rows, []
    for activation, kernels, biases, scale in zip(static.activations, *experts, strict=True):
        sums.append(linear(hidden, kernels, biases))
        hidden = _activated(activation, sums[-1], scale)
    return hidden, sums[: num_remembered(static, experts)]


def num_remembered(static: Static, experts: Experts) -> int:
    """Number of layers whose sums a backward pass needs: a last layer that is linear needs none."""
    is_linear = static.activations[-1] is None and not experts.scales[-1]
    return len(static.activations) - is_linear


def apply_backward(
    static: Static,
    experts: Experts,
    rows: Tensor | Rows,
    sums: Any,
    upstream: Tensor | Rows,
    weight_of: Tensor,
    linear_backward: Callable[..., Any],
) -> tuple[Tensor, Tensor, Experts]:
    """The gradients of `apply` and of a product of each row it gives with a weight.

    Args:
        static: what the walk is traced for.
        experts: as for `apply`.
        rows: as for `apply`.
        sums: what `apply` gave to remember.
        upstream: the cotangent of each row's weighted output.
        weight_of: `(rows, 1)`, the weight of each.
        linear_backward: `linear_backward(rows, grad_sums, kernels, biases, weight_of)`, the
            gradients of one layer, and those of the weights if there are any.

    Returns:
        The gradients of the rows, `(rows, d)`, of the weights, `(rows, 1)`, and of the experts.
    """
    inputs, pullbacks = [rows], []
    for activation, before, scale in zip(static.activations, sums, experts.scales, strict=False):
        hidden, pullback = _with_pullback(partial(_activated, activation), before, scale)
        inputs.append(hidden)
        pullbacks.append(pullback)
    grad_stage, grad_weight, weight = [], None, weight_of
    if len(pullbacks) == len(static.activations):
        unweighted = upstream[:]
        grad_weight = row_sums(inputs.pop() * unweighted)
        upstream, weight = unweighted * tf.cast(weight_of, unweighted.dtype), None
    for index in reversed(range(len(static.activations))):
        grad_sums, grad_scale = (upstream,), ()
        if index < len(pullbacks):
            grad_sums, grad_scale = pullbacks[index](upstream)
        upstream, grad_kernels, grad_biases, new_grad_weight = linear_backward(
            inputs[index], grad_sums, experts.kernels[index], experts.biases[index], weight
        )
        grad_weight, weight = new_grad_weight if grad_weight is None else grad_weight, None
        grad_stage.append((grad_kernels, grad_biases, grad_scale))
    return upstream, grad_weight, Experts(*zip(*reversed(grad_stage), strict=True))


def linear(rows: Tensor, kernels: Any, biases: Any) -> tuple[Tensor, ...]:
    """rows @ kernel + bias, for each kernel."""
    sums = tuple(tf.matmul(rows, kernel) for kernel in kernels)
    if not biases:
        return sums
    return tuple(tf.nn.bias_add(each, bias) for each, bias in zip(sums, biases, strict=True))


def linear_backward(
    rows: Tensor, grad_sums: Any, kernels: Any, biases: Any, weight: Tensor | None
) -> tuple[Any, Any, Any, Any]:
    """The gradients of `linear`, whose sums are then multiplied by `weight (rows, 1)`, if any.

    Those of kernels, biases and weight are float32 at least. The gradient of a weight is
    <h W + b, upstream> = <h, upstream W^T> + <b, upstream>: the layer's outputs are not needed.
    """
    grad_weight = None
    grad_rows = [
        tf.matmul(each, kernel, transpose_b=True)
        for each, kernel in zip(grad_sums, kernels, strict=True)
    ]
    grad_rows = sum(grad_rows[1:], start=grad_rows[0])
    if weight is not None:
        grad_weight = row_sums(rows * grad_rows)
        for each, bias in zip(grad_sums, biases, strict=False):
            grad_weight = grad_weight + row_sums(each * bias)
        weight = tf.cast(weight, rows.dtype)
        grad_rows, grad_sums = grad_rows * weight, [each * weight for each in grad_sums]
    dtype = wide(rows.dtype)
    wide_rows, wide_sums = tf.cast(rows, dtype), [tf.cast(each, dtype) for each in grad_sums]
    grad_kernels = tuple(tf.matmul(wide_rows, each, transpose_a=True) for each in wide_sums)
    grad_biases = tuple(tf.reduce_sum(each, axis=0) for each in wide_sums[: len(biases)])
    return grad_rows, grad_kernels, grad_biases, grad_weight


def row_sums(rows: Tensor) -> Tensor:
    """The sum of each row, `(rows, 1)`, in float32 at least."""
    return tf.reduce_sum(tf.cast(rows, wide(rows.dtype)), axis=-1, keepdims=True)


def _activated(activation: Any, sums: tuple[Tensor, ...], scale: tuple[Tensor, ...]) -> Tensor:
    hidden = sums[0] if activation is None else activation(*sums)
    return hidden * scale[0] if scale else hidden


def _with_pullback(function: Callable[..., Tensor], *arguments: Any) -> tuple[Tensor, Any]:
    """The value of an elementwise function, and the function from its cotangent to gradients."""
    if not tf.executing_eagerly():  # without a tape, since none may be recording
        value = function(*arguments)

        def pullback_in_graph(cotangent: Tensor) -> Any:
            flat = tf.nest.flatten(arguments)
            found = tf.gradients(value, flat, cotangent, unconnected_gradients="zero")
            return tf.nest.pack_sequence_as(arguments, found)

        return value, pullback_in_graph
    with tf.GradientTape() as tape:
        tape.watch(tf.nest.flatten(arguments))
        value = function(*arguments)

    def pullback(cotangent: Tensor) -> Any:
        return tape.gradient(
            value, arguments, output_gradients=cotangent, unconnected_gradients="zero"
        )

    return value, pullback


def wide(dtype: Any) -> Any:
    """The dtype that sums over rows are taken in."""
    return tf.float32 if dtype.size < tf.float32.size else dtype


def starts_of(ends: Tensor) -> Tensor:
    """Starts of the experts' rows."""
    return tf.concat([tf.zeros_like(ends[:1]), ends[:-1]], axis=0)


def over_indices(count: Size, body: Callable[..., Any], carry: Any) -> Any:
    """Folds `body(index, carry)` over 0 to count - 1."""
    state = (tf.constant(0), carry)
    return tf.while_loop(
        lambda index, _: index < count, lambda index, carry: (index + 1, body(index, carry)), state
    )[1]
