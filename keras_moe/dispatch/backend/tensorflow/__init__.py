"""Dropless dispatch on TensorFlow: a walk over the experts, with a gradient of its own.

There are two of it. Where shapes may be dynamic, each expert multiplies exactly its own rows
(`ranges`). XLA wants static shapes, so there the walk is one over blocks of static sizes
(`blocks`).

What is kept for the backward pass: the tokens, and what each activation was applied to, one row per
assignment. Rows are gathered from the tokens when it is their turn and never stand in memory as a
whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import record

from keras_moe.core.types import Size, Tensor
from keras_moe.dispatch.backend import portable
from keras_moe.dispatch.backend.portable import (  # noqa: F401
    DIVIDES,
    HAS_GROUPED_MATMUL,
    device_index,
    eagerly,
    grouped_matmul,
    inverse_permutation,
    is_recomputing,
    is_traced_for_export,
    may_have_grouped_matmul,
    on_each_device,
    reach,
    segment_sum,
    sort_for_export,
    sum_over_devices,
    value_and_gradients,
    with_gradient,
    without_autocast,
)
from keras_moe.dispatch.backend.tensorflow import blocks, ranges
from keras_moe.dispatch.backend.tensorflow.stages import Experts, Route, Static
from keras_moe.dispatch.layout import Rows, Stage

WALKS = True


def row_padding(total: Size, num_experts: int) -> int:
    """Rows that must follow the last one, so that no block reaches past the array."""
    return blocks.block_sizes(total, num_experts)[0] if _is_under_xla() else 0


@tf.autograph.experimental.do_not_convert
def walk(tokens: Tensor, rows: Rows, stages: Sequence[Stage]) -> Tensor:
    """Applies each token's experts and sums what they give, weighted.

    Args:
        tokens: `(N, d)`.
        rows: who goes where, with which weight, and `row_padding` empty slots behind the last one.
        stages: the layers of the experts.

    Returns:
        `(N, out)`, summed in float32 at least.
    """
    weights, slots, ends = rows.weights, rows.slots, rows.ends
    if tokens.shape[0] == 0:  # there is no row that an empty slot could hold
        return tf.zeros((0, stages[-1].kernels[0].shape[-1]), tokens.dtype)
    top_k, total = weights.shape[-1], slots.slot_of.shape[0]
    is_under_xla = _is_under_xla()
    sizes = blocks.block_sizes(total, ends.shape[0]) if is_under_xla else ()
    static = Static(tuple(stage.activation for stage in stages), sizes)
    experts = Experts(
        tuple(stage.kernels for stage in stages),
        tuple(stage.biases for stage in stages),
        tuple(() if stage.scale is None else (stage.scale,) for stage in stages),
    )
    # The gradient must be of the same kind, wherever it is traced.
    kind = blocks if is_under_xla else ranges
    count = tf.shape(weights)[0]
    assignment = tf.minimum(slots.assignment, count * top_k - 1)  # of an empty slot, some
    token_of = assignment % tf.maximum(count, 1)

    @tf.custom_gradient
    def apply(tokens: Tensor, weights: Tensor, *flat: Tensor) -> Any:
        packed = tf.nest.pack_sequence_as(experts, flat)
        weight_of = tf.gather(tf.reshape(tf.transpose(weights), [-1]), assignment)[:, None]
        route = Route(slots, token_of, ends, weights, weight_of)
        with _unrecorded(is_under_xla):
            result, sums = kind.forward(static, tokens, route, packed)

        def gradient(cotangent: Tensor) -> list[Tensor]:
            if _is_mapped():
                return _plain_gradients(plain, (tokens, weights, *flat), cotangent)
            with _unrecorded(is_under_xla):
                grad_tokens, grad_weights, grad_experts = kind.backward(
                    static, tokens, route, packed, sums, cotangent
                )
            return [
                tf.cast(grad_tokens, tokens.dtype),
                tf.cast(grad_weights, weights.dtype),
                *tf.nest.flatten(grad_experts),
            ]

        @tf.custom_gradient
        def gradient_under_xla(cotangent: Tensor, *inputs: Tensor) -> Any:
            return gradient(cotangent), partial(_second, plain, cotangent, inputs)

        def differentiable(cotangent: Tensor) -> Any:
            return gradient_under_xla(cotangent, tokens, weights, *flat)

        return tf.cast(result, tokens.dtype), differentiable if is_under_xla else gradient

    def plain(tokens: Tensor, weights: Tensor, *flat: Tensor) -> Tensor:
        parts = zip(*tf.nest.pack_sequence_as(experts, flat), static.activations, strict=True)
        stages = [
            Stage(kernels, biases, activation, *scale)
            for kernels, biases, scale, activation in parts
        ]
        return portable.walk(tokens, Rows(weights, slots, ends), stages)

    inputs = [tokens, weights, *map(tf.convert_to_tensor, tf.nest.flatten(experts))]
    return plain(*inputs) if _is_mapped() else apply(*inputs)


def _is_mapped() -> bool:
    """Whether `tf.vectorized_map`, or a Jacobian, traces the call: it cannot map over these loops.

    There is no public way to ask; "loop_body" is the scope that it traces in.
    """
    if tf.executing_eagerly():
        return False
    return "loop_body" in tf.compat.v1.get_default_graph().get_name_scope().split("/")


def _unrecorded(is_under_xla: bool) -> Any:
    """Keeps tapes from looking for gradients of XLA's loops, which have none."""
    return record.stop_recording() if is_under_xla else nullcontext()


def _second(
    plain: Callable[..., Tensor],
    cotangent: Tensor,
    inputs: Sequence[Tensor],
    *upstream: Tensor,
) -> list[Tensor]:
    """Second derivatives: those of the same sums in operations that TensorFlow differentiates."""
    with tf.GradientTape() as outer:
        outer.watch([cotangent, *inputs])
        grads = _plain_gradients(plain, inputs, cotangent)
    return _dense_gradients(outer, grads, [cotangent, *inputs], upstream)


def _plain_gradients(
    plain: Callable[..., Tensor], inputs: Sequence[Tensor], cotangent: Tensor
) -> list[Tensor]:
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        sums = plain(*inputs)
    return _dense_gradients(tape, sums, inputs, cotangent)


def _dense_gradients(
    tape: tf.GradientTape, values: Any, inputs: Sequence[Tensor], upstream: Any
) -> list[Tensor]:
    found = tape.gradient(values, inputs, upstream, unconnected_gradients="zero")
    return [tf.convert_to_tensor(each) for each in found]


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether what is computed from a tensor, traced or not, is computed on a CPU."""
    return not any(tf.config.list_physical_devices(kind) for kind in ("GPU", "TPU"))


def _is_under_xla() -> bool:
    """Whether a graph is traced that XLA will compile.

    There is no public way to ask; this is what TensorFlow's own layers used.
    """
    if tf.executing_eagerly():
        return False
    graph = tf.compat.v1.get_default_graph()
    while graph is not None:
        with graph.as_default():
            if tf.__internal__.get_enclosing_xla_context() is not None:
                return True
        graph = getattr(graph, "outer_graph", None)
    return False


def sum_over_replicas(values: Sequence[Tensor]) -> Sequence[Tensor]:
    """The sums of float32 values over the replicas of a `tf.distribute` strategy, no gradient."""
    replica = tf.distribute.get_replica_context()
    if replica is None or replica.num_replicas_in_sync == 1:
        return values
    flat = tf.concat([tf.reshape(tf.stop_gradient(value), (-1,)) for value in values], axis=0)
    flat = replica.all_reduce(tf.distribute.ReduceOp.SUM, flat)
    parts = tf.split(flat, [value.shape.num_elements() for value in values])
    return [tf.reshape(part, value.shape) for part, value in zip(parts, values, strict=True)]
