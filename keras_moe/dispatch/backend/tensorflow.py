"""Grouped feed-forward layers on TensorFlow: a walk over the experts, with a gradient of its own.

There are two of it. Where shapes may be dynamic, each expert multiplies exactly its own rows. XLA
wants static shapes, so there the walk is one over blocks of static sizes, as on JAX. A block may
reach past the end of its expert's rows. What it writes there is overwritten by the next expert,
whose blocks begin where this one's rows end. Behind the last row there must be `row_padding` rows
to spare.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import tensorflow as tf
from keras import ops
from tensorflow.compiler.tf2xla.python import xla

from keras_moe.dispatch.stages import Stage
from keras_moe.types import Tensor


class _Static(NamedTuple):
    """What a walk is traced for."""

    activations: tuple[Callable[..., Tensor] | None, ...]
    block_sizes: tuple[int, ...]  # the largest first; each is a loop of its own


class _Experts(NamedTuple):
    """The tensors of the layers: of all experts, of one expert, or of their gradients.

    The scales are always of the rows at hand. A missing one is an empty tuple: TensorFlow's trees
    take None for a leaf.
    """

    kernels: tuple[tuple[Tensor, ...], ...]
    biases: tuple[tuple[Tensor, ...], ...]
    scales: tuple[tuple[Tensor, ...], ...]


def block_sizes(total: int | Tensor, num_experts: int) -> tuple[int, ...]:
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


def row_padding(total: int | Tensor, num_experts: int) -> int:
    """Rows that must follow the last one, so that no block reaches past the array."""
    return block_sizes(total, num_experts)[0] if _is_under_xla() else 0


@tf.autograph.experimental.do_not_convert
def walk(rows: Tensor, ends: Tensor, stages: Sequence[Stage], total: int | Tensor) -> Tensor:
    """Applies each expert to its own rows.

    Args:
        rows: `(total + row_padding, d)`, sorted by expert.
        ends: int32 `(E,)`, where each expert's rows end; the first one's begin at 0.
        stages: the layers of the experts.
        total: rows without the padding.

    Returns:
        `(total + row_padding, out)`; past `ends[-1]` it is undefined.
    """
    sizes = block_sizes(total, stages[0].kernels[0].shape[0])
    static = _Static(tuple(stage.activation for stage in stages), sizes)
    experts = _Experts(
        tuple(stage.kernels for stage in stages),
        tuple(stage.biases for stage in stages),
        tuple(() if stage.scale is None else (stage.scale,) for stage in stages),
    )
    # The gradient must be of the same kind, wherever it is traced.
    forward, backward = _ON_BLOCKS if _is_under_xla() else _ON_RANGES

    @tf.custom_gradient
    def apply(rows: Tensor, *flat: Tensor) -> Any:
        packed = tf.nest.pack_sequence_as(experts, flat)
        outputs, sums = forward(static, rows, ends, packed)

        def gradient(cotangent: Tensor) -> list[Tensor]:
            return tf.nest.flatten(backward(static, rows, ends, packed, sums, cotangent))

        return outputs, gradient

    return apply(rows, *[tf.convert_to_tensor(each) for each in tf.nest.flatten(experts)])


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


def _apply(
    static: _Static, experts: _Experts, rows: Tensor, linear: Callable[..., Any]
) -> tuple[Tensor, list[Any]]:
    """Returns the outputs and, as far as a backward pass needs it, what was activated."""
    hidden, sums = rows, []
    for activation, kernels, biases, scale in zip(static.activations, *experts, strict=True):
        sums.append(linear(hidden, kernels, biases))
        hidden = _activated(activation, sums[-1], scale)
    return hidden, sums[: _num_remembered(static, experts)]


def _num_remembered(static: _Static, experts: _Experts) -> int:
    """A last layer that is linear needs nothing for its backward pass."""
    is_linear = static.activations[-1] is None and not experts.scales[-1]
    return len(static.activations) - is_linear


def _apply_backward(
    static: _Static,
    experts: _Experts,
    rows: Tensor,
    sums: Any,
    upstream: Tensor,
    linear_backward: Callable[..., Any],
) -> tuple[Tensor, _Experts]:
    """The gradients of `_apply`."""
    inputs, pullbacks = [rows], []
    for activation, before, scale in zip(static.activations, sums, experts.scales, strict=False):
        hidden, pullback = _with_pullback(partial(_activated, activation), before, scale)
        inputs.append(hidden)
        pullbacks.append(pullback)
    by_stage = []
    for index in reversed(range(len(static.activations))):
        by_sums, by_scale = (upstream,), ()
        if index < len(pullbacks):
            by_sums, by_scale = pullbacks[index](upstream)
        upstream, by_kernels, by_biases = linear_backward(
            inputs[index], by_sums, experts.kernels[index], experts.biases[index]
        )
        by_stage.append((by_kernels, by_biases, by_scale))
    return upstream, _Experts(*zip(*reversed(by_stage), strict=True))


def _linear(rows: Tensor, kernels: Any, biases: Any) -> tuple[Tensor, ...]:
    sums = tuple(tf.matmul(rows, kernel) for kernel in kernels)
    if not biases:
        return sums
    return tuple(tf.nn.bias_add(each, bias) for each, bias in zip(sums, biases, strict=True))


def _linear_backward(rows: Tensor, by_sums: Any, kernels: Any, biases: Any) -> tuple[Any, Any, Any]:
    """The gradients of `_linear`; the weights' are float32 at least."""
    wide = _wide(rows.dtype)
    wide_rows, wide_sums = tf.cast(rows, wide), [tf.cast(each, wide) for each in by_sums]
    by_rows = [
        tf.matmul(each, kernel, transpose_b=True)
        for each, kernel in zip(by_sums, kernels, strict=True)
    ]
    by_kernels = tuple(tf.matmul(wide_rows, each, transpose_a=True) for each in wide_sums)
    by_biases = tuple(tf.reduce_sum(each, axis=0) for each in wide_sums[: len(biases)])
    return sum(by_rows[1:], start=by_rows[0]), by_kernels, by_biases


def _activated(activation: Any, sums: tuple[Tensor, ...], scale: tuple[Tensor, ...]) -> Tensor:
    hidden = sums[0] if activation is None else activation(*sums)
    return hidden * scale[0] if scale else hidden


def _with_pullback(function: Callable[..., Tensor], *arguments: Any) -> tuple[Tensor, Any]:
    """The value of an elementwise function, and the function from its cotangent to gradients."""
    with tf.GradientTape() as tape:
        tape.watch(tf.nest.flatten(arguments))
        value = function(*arguments)

    def pullback(cotangent: Tensor) -> Any:
        return tape.gradient(
            value, arguments, output_gradients=cotangent, unconnected_gradients="zero"
        )

    return value, pullback


def _wide(dtype: Any) -> Any:
    """The dtype that sums over rows are taken in."""
    return tf.float32 if dtype.size < tf.float32.size else dtype


def _ranges_forward(
    static: _Static, rows: Tensor, ends: Tensor, experts: _Experts
) -> tuple[Tensor, Any]:
    starts, num_experts = _starts(ends), experts.kernels[0][0].shape[0]

    def body(index: Tensor, carry: Any) -> Any:
        start, end = starts[index], ends[index]
        expert = _expert(experts, index, lambda scale: scale[start:end])
        hidden, sums = _apply(static, expert, rows[start:end], _linear)
        return tf.nest.map_structure(partial(_put, index), carry, (hidden, sums))

    def pieces(kernel: Tensor) -> tf.TensorArray:
        return _pieces(rows.dtype, num_experts, kernel.shape[-1])

    remembered = experts.kernels[: _num_remembered(static, experts)]
    carry = (pieces(experts.kernels[-1][0]), tf.nest.map_structure(pieces, list(remembered)))
    outputs, sums = _over_indices(num_experts, body, carry)
    # Joined, since a SavedModel cannot keep a gradient that captures a `TensorArray`.
    sums = tf.nest.map_structure(lambda each: _joined(each, rows, ends), sums)
    return _joined(outputs, rows, ends), sums


def _ranges_backward(
    static: _Static, rows: Tensor, ends: Tensor, experts: _Experts, sums: Any, cotangent: Tensor
) -> tuple[Tensor, _Experts]:
    starts, num_experts = _starts(ends), experts.kernels[0][0].shape[0]

    def body(index: Tensor, carry: Any) -> Any:
        start, end = starts[index], ends[index]
        expert = _expert(experts, index, lambda scale: scale[start:end])
        before = tf.nest.map_structure(lambda all_: all_[start:end], sums)
        by_row, by_expert = _apply_backward(
            static, expert, rows[start:end], before, cotangent[start:end], _linear_backward
        )
        weights = tf.nest.map_structure(
            lambda all_, new: tf.cast(new, all_.dtype), experts[:2], by_expert[:2]
        )
        return tf.nest.map_structure(partial(_put, index), carry, (by_row, weights, by_expert[2]))

    carry = (
        _pieces(rows.dtype, num_experts, rows.shape[-1]),
        tf.nest.map_structure(
            lambda all_: tf.TensorArray(all_.dtype, num_experts, element_shape=all_.shape[1:]),
            experts[:2],
        ),
        tf.nest.map_structure(
            lambda all_: _pieces(all_.dtype, num_experts, all_.shape[-1]), experts.scales
        ),
    )
    by_row, weights, scales = _over_indices(num_experts, body, carry)
    kernels, biases = tf.nest.map_structure(lambda each: each.stack(), weights)
    scales = tf.nest.map_structure(lambda each: _joined(each, rows, ends), scales)
    return _joined(by_row, rows, ends), _Experts(kernels, biases, scales)


def _over_indices(count: int | Tensor, body: Callable[..., Any], carry: Any) -> Any:
    state = (tf.constant(0), carry)
    return tf.while_loop(
        lambda index, _: index < count, lambda index, carry: (index + 1, body(index, carry)), state
    )[1]


def _starts(ends: Tensor) -> Tensor:
    return tf.concat([tf.zeros_like(ends[:1]), ends[:-1]], axis=0)


def _expert(experts: _Experts, index: Tensor, own: Callable[[Tensor], Tensor]) -> _Experts:
    kernels, biases = tf.nest.map_structure(lambda all_: all_[index], experts[:2])
    return _Experts(kernels, biases, tf.nest.map_structure(own, experts.scales))


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


def _joined(pieces: tf.TensorArray, rows: Tensor, ends: Tensor) -> Tensor:
    """The experts' pieces, and zeros for the rows of none."""
    shape = [tf.shape(rows)[0] - ends[-1], pieces.element_shape[-1]]
    joined = pieces.write(pieces.size() - 1, tf.zeros(shape, pieces.dtype)).concat()
    return tf.ensure_shape(joined, [rows.shape[0], pieces.element_shape[-1]])


def _blocks_forward(
    static: _Static, rows: Tensor, ends: Tensor, experts: _Experts
) -> tuple[Tensor, Any]:
    """Layer by layer, since XLA runs what is elementwise on all processors outside of loops only.

    Besides, what only a backward pass needs is never dropped from a loop within a loop.
    """
    linear = partial(_linear_on_blocks, static.block_sizes, ends)
    outputs, sums = _apply(static, experts, rows, linear)
    # A tape around a compiled function would look for the loops' own gradients, and there are none.
    return outputs, tf.nest.map_structure(tf.stop_gradient, sums)


def _blocks_backward(
    static: _Static, rows: Tensor, ends: Tensor, experts: _Experts, sums: Any, cotangent: Tensor
) -> tuple[Tensor, _Experts]:
    linear_backward = partial(_linear_on_blocks_backward, static.block_sizes, ends)
    return _apply_backward(static, experts, rows, sums, cotangent, linear_backward)


def _linear_on_blocks(
    sizes: tuple[int, ...], ends: Tensor, rows: Tensor, kernels: Any, biases: Any
) -> Any:
    def block(size: int, expert: Any, at: Tensor, end: Tensor, sums: Any) -> Any:
        del end
        return tf.nest.map_structure(
            partial(_write, at), sums, _linear(_read(at, size, rows), *expert)
        )

    def over_blocks(expert: Any, index: Tensor, start: Tensor, end: Tensor, sums: Any) -> Any:
        del index
        return _over_blocks(block, sizes, expert, start, end, sums)

    sums = tuple(tf.zeros([tf.shape(rows)[0], each.shape[-1]], rows.dtype) for each in kernels)
    return _over_experts(over_blocks, ends, (kernels, biases), sums)


def _linear_on_blocks_backward(
    sizes: tuple[int, ...], ends: Tensor, rows: Tensor, by_sums: Any, kernels: Any, biases: Any
) -> tuple[Any, Any, Any]:
    weights = (kernels, biases)

    def block(size: int, expert: Any, at: Tensor, end: Tensor, carry: Any) -> Any:
        is_own = (at + tf.range(size) < end)[:, None]

        def own(all_: Tensor) -> Tensor:  # zero times a NaN of the next expert's would be NaN
            return tf.where(is_own, _read(at, size, all_), tf.zeros([], all_.dtype))

        by_rows, slopes = carry
        by_row, *new = _linear_backward(own(rows), tf.nest.map_structure(own, by_sums), *expert)
        return _write(at, by_rows, by_row), tf.nest.map_structure(tf.add, slopes, tuple(new))

    def over_blocks(expert: Any, index: Tensor, start: Tensor, end: Tensor, carry: Any) -> Any:
        by_rows, by_weights = carry
        slopes = tf.nest.map_structure(
            lambda all_: tf.zeros(all_.shape[1:], _wide(all_.dtype)), weights
        )
        by_rows, slopes = _over_blocks(block, sizes, expert, start, end, (by_rows, slopes))
        return by_rows, tf.nest.map_structure(
            lambda all_, new: _write(index, all_, tf.cast(new, all_.dtype)[None]),
            by_weights,
            slopes,
        )

    carry = tf.nest.map_structure(tf.zeros_like, (rows, weights))
    by_rows, by_weights = _over_experts(over_blocks, ends, weights, carry)
    return by_rows, *by_weights


def _over_experts(step: Callable[..., Any], ends: Tensor, weights: Any, carry: Any) -> Any:
    """Folds over the experts that have rows; the weights of each are copied once, not per block."""
    starts = _starts(ends)
    has_rows = ends > starts
    # Those with rows first, in order.
    busy = tf.argsort(tf.cast(tf.logical_not(has_rows), tf.int32), stable=True)

    def body(place: Tensor, carry: Any) -> Any:
        index = busy[place]
        expert = tf.nest.map_structure(lambda all_: all_[index], weights)
        return step(expert, index, starts[index], ends[index], carry)

    return _over_indices(tf.reduce_sum(tf.cast(has_rows, tf.int32)), body, carry)


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
            del carry
            return end - at >= least

        def take(at: Tensor, carry: Any, size: int = size) -> Any:
            return at + size, block(size, expert, at, end, carry)

        state = tf.while_loop(has_enough, take, state)
    return state[1]


def _read(at: Tensor, size: int, rows: Tensor) -> Tensor:
    return tf.slice(rows, [at, 0], [size, rows.shape[-1]])


def _write(at: Tensor, all_: Tensor, block: Tensor) -> Tensor:
    """Writes along the first axis, in place if XLA can."""
    indices = [at, *[0] * (len(all_.shape) - 1)]
    return ops.slice_update(all_, indices, block)


_ON_RANGES = (_ranges_forward, _ranges_backward)
_ON_BLOCKS = (_blocks_forward, _blocks_backward)


def computed_once(tensor: Tensor) -> Tensor:
    """A tensor that XLA may not compute anew for each of its readers."""
    if not _is_under_xla():
        return tensor

    @tf.custom_gradient
    def keep(tensor: Tensor) -> Any:
        (kept,) = xla.optimization_barrier(tensor)
        return kept, lambda upstream: upstream

    return keep(tensor)


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether what is computed from a tensor, traced or not, is computed on a CPU."""
    del tensor
    return not any(tf.config.list_physical_devices(kind) for kind in ("GPU", "TPU"))
