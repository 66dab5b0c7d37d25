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


# --- one expert's rows -----------------------------------------------------------------------------


def _apply(static: _Static, expert: _Experts, rows: Tensor) -> tuple[Tensor, list[Any]]:
    """Returns the outputs and, as far as a backward pass needs it, what was activated."""
    hidden, sums = rows, []
    stages = zip(static.activations, *expert, strict=True)
    for activation, kernels, biases, scale in stages:
        sums.append(_linear(hidden, kernels, biases))
        hidden = _activated(activation, sums[-1], scale)
    return hidden, sums[: _num_remembered(static, expert)]


def _num_remembered(static: _Static, expert: _Experts) -> int:
    """A last layer that is linear needs nothing for its backward pass."""
    is_linear = static.activations[-1] is None and not expert.scales[-1]
    return len(static.activations) - is_linear


def _apply_backward(
    static: _Static,
    expert: _Experts,
    rows: Tensor,
    sums: Any,
    upstream: Tensor,
    own: Callable[[Tensor], Tensor],
) -> tuple[Tensor, _Experts]:
    """The gradients of `_apply`; weights' are float32 at least. `own` blanks others' rows."""
    inputs, pullbacks = [own(rows)], []
    for activation, before, scale in zip(static.activations, sums, expert.scales, strict=False):
        hidden, pullback = _with_pullback(partial(_activated, activation), before, scale)
        inputs.append(own(hidden))
        pullbacks.append(pullback)
    upstream = own(upstream)
    by_kernels, by_biases, by_scales = [], [], []
    for index in reversed(range(len(static.activations))):
        by_sum, by_scale = (upstream,), ()
        if index < len(pullbacks):  # a slope may be NaN where the row is not its own
            by_sum, by_scale = tf.nest.map_structure(own, pullbacks[index](upstream))
        kernels, biases = expert.kernels[index], expert.biases[index]
        by_kernels.append(tuple(_wide_product(inputs[index], each) for each in by_sum))
        by_biases.append(tuple(_wide_sum(each) for each in by_sum[: len(biases)]))
        by_scales.append(by_scale)
        upstream = _sum(
            tf.matmul(each, kernel, transpose_b=True)
            for each, kernel in zip(by_sum, kernels, strict=True)
        )
    gradients = (tuple(reversed(each)) for each in (by_kernels, by_biases, by_scales))
    return upstream, _Experts(*gradients)


def _linear(rows: Tensor, kernels: Any, biases: Any) -> tuple[Tensor, ...]:
    sums = tuple(tf.matmul(rows, kernel) for kernel in kernels)
    if not biases:
        return sums
    return tuple(tf.nn.bias_add(each, bias) for each, bias in zip(sums, biases, strict=True))


def _activated(activation: Any, sums: tuple[Tensor, ...], scale: tuple[Tensor, ...]) -> Tensor:
    hidden = sums[0] if activation is None else activation(*sums)
    return hidden * scale[0] if scale else hidden


def _with_pullback(function: Callable[..., Tensor], *arguments: Any) -> tuple[Tensor, Any]:
    """The value of an elementwise function, and the function from its cotangent to gradients."""
    with tf.GradientTape(persistent=False) as tape:
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


def _wide_product(rows: Tensor, upstream: Tensor) -> Tensor:
    wide = _wide(rows.dtype)
    return tf.matmul(tf.cast(rows, wide), tf.cast(upstream, wide), transpose_a=True)


def _wide_sum(upstream: Tensor) -> Tensor:
    return tf.reduce_sum(tf.cast(upstream, _wide(upstream.dtype)), axis=0)


def _sum(terms: Any) -> Tensor:
    first, *others = terms
    return sum(others, start=first)


# --- where shapes may be dynamic -------------------------------------------------------------------


def _ranges_forward(
    static: _Static, rows: Tensor, ends: Tensor, experts: _Experts
) -> tuple[Tensor, Any]:
    starts, num_experts = _starts(ends), experts.kernels[0][0].shape[0]

    def body(index: Tensor, carry: Any) -> Any:
        start, end = starts[index], ends[index]
        expert = _expert(experts, index, lambda scale: scale[start:end])
        hidden, sums = _apply(static, expert, rows[start:end])
        return tf.nest.map_structure(partial(_put, index), carry, (hidden, sums))

    def pieces(kernel: Tensor) -> tf.TensorArray:
        return _pieces(rows.dtype, num_experts, kernel.shape[-1])

    remembered = experts.kernels[: _num_remembered(static, experts)]
    carry = (pieces(experts.kernels[-1][0]), tf.nest.map_structure(pieces, list(remembered)))
    outputs, sums = _over_indices(num_experts, body, carry)
    return _joined(outputs, rows, ends), sums


def _ranges_backward(
    static: _Static, rows: Tensor, ends: Tensor, experts: _Experts, sums: Any, cotangent: Tensor
) -> tuple[Tensor, _Experts]:
    starts, num_experts = _starts(ends), experts.kernels[0][0].shape[0]

    def body(index: Tensor, carry: Any) -> Any:
        start, end = starts[index], ends[index]
        expert = _expert(experts, index, lambda scale: scale[start:end])
        before = tf.nest.map_structure(lambda pieces: pieces.read(index), sums)
        by_row, by_expert = _apply_backward(
            static, expert, rows[start:end], before, cotangent[start:end], tf.identity
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
    return _joined(by_row, rows, ends), _Experts(
        *tf.nest.map_structure(lambda each: each.stack(), weights),
        tf.nest.map_structure(lambda each: _joined(each, rows, ends), scales),
    )


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


# --- under XLA -------------------------------------------------------------------------------------


def _blocks_forward(
    static: _Static, rows: Tensor, ends: Tensor, experts: _Experts
) -> tuple[Tensor, Any]:
    def block(size: int, expert: _Experts, at: Tensor, end: Tensor, carry: Any) -> Any:
        del end
        scales = tf.nest.map_structure(partial(_read, at, size), expert.scales)
        hidden, sums = _apply(static, expert._replace(scales=scales), _read(at, size, rows))
        return tf.nest.map_structure(partial(_write, at), carry, (hidden, sums))

    def over_blocks(expert: _Experts, index: Tensor, start: Tensor, end: Tensor, carry: Any) -> Any:
        del index
        return _over_blocks(block, static.block_sizes, expert, start, end, carry)

    def empty(kernel: Tensor) -> Tensor:
        return tf.zeros([tf.shape(rows)[0], kernel.shape[-1]], rows.dtype)

    remembered = experts.kernels[: _num_remembered(static, experts)]
    carry = (empty(experts.kernels[-1][0]), tf.nest.map_structure(empty, list(remembered)))
    return _over_experts(over_blocks, ends, experts, carry)


def _blocks_backward(
    static: _Static, rows: Tensor, ends: Tensor, experts: _Experts, sums: Any, cotangent: Tensor
) -> tuple[Tensor, _Experts]:
    def block(size: int, expert: _Experts, at: Tensor, end: Tensor, carry: Any) -> Any:
        is_own = (at + tf.range(size) < end)[:, None]
        read = partial(_read, at, size)
        by_row, by_expert = _apply_backward(
            static,
            expert._replace(scales=tf.nest.map_structure(read, expert.scales)),
            read(rows),
            tf.nest.map_structure(read, sums),
            read(cotangent),
            lambda each: tf.where(is_own, each, tf.zeros([], each.dtype)),
        )
        row_gradients, slopes = carry
        return (
            tf.nest.map_structure(partial(_write, at), row_gradients, (by_row, by_expert.scales)),
            tf.nest.map_structure(tf.add, slopes, by_expert[:2]),
        )

    def over_blocks(expert: _Experts, index: Tensor, start: Tensor, end: Tensor, carry: Any) -> Any:
        row_gradients, weights = carry
        slopes = tf.nest.map_structure(
            lambda all_: tf.zeros(all_.shape[1:], _wide(all_.dtype)), experts[:2]
        )
        row_gradients, slopes = _over_blocks(
            block, static.block_sizes, expert, start, end, (row_gradients, slopes)
        )
        return row_gradients, tf.nest.map_structure(
            lambda all_, new: _write(index, all_, tf.cast(new, all_.dtype)[None]), weights, slopes
        )

    carry = tf.nest.map_structure(tf.zeros_like, ((rows, experts.scales), experts[:2]))
    (by_row, scales), weights = _over_experts(over_blocks, ends, experts, carry)
    return by_row, _Experts(*weights, scales)


def _over_experts(step: Callable[..., Any], ends: Tensor, experts: _Experts, carry: Any) -> Any:
    """Folds over the experts that have rows; the weights of each are copied once, not per block."""
    starts = _starts(ends)
    has_rows = ends > starts
    # Those with rows first, in order.
    busy = tf.argsort(tf.cast(tf.logical_not(has_rows), tf.int32), stable=True)

    def body(place: Tensor, carry: Any) -> Any:
        index = busy[place]
        return step(_expert(experts, index, tf.identity), index, starts[index], ends[index], carry)

    return _over_indices(tf.reduce_sum(tf.cast(has_rows, tf.int32)), body, carry)


def _over_blocks(
    block: Callable[..., Any],
    sizes: tuple[int, ...],
    expert: _Experts,
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
