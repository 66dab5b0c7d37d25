"""Dropless dispatch on JAX: a walk over blocks of rows, compiled by XLA.

XLA wants static shapes, and how many rows an expert has is known at run time only. So the walk is a
`while` over blocks of a static size: expert by expert, as many blocks as its rows fill. It may be
one because it stands inside of a custom gradient, which is a walk of its own.

A block may reach past the end of its expert's rows. What it writes there is overwritten by the next
expert, whose blocks begin where this one's rows end: no padding between experts, and no masks in
the forward pass. Behind the last row there must be `row_padding` rows to spare.

What is kept for the backward pass: the tokens, and what each activation was applied to, one row per
assignment. Rows are gathered from the tokens block by block and never stand in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from keras_moe.core.types import Tensor
from keras_moe.dispatch.backend.portable import (  # noqa: F401
    inverse_permutation,
    is_traced_for_export,
    reach,
    sort_for_export,
)
from keras_moe.dispatch.layout import Rows, Slots, Stage

WALKS = HAS_GROUPED_MATMUL = True


class _Static(NamedTuple):
    """What a walk is compiled for."""

    activations: tuple[Callable[..., Tensor] | None, ...]
    block_sizes: tuple[int, ...]  # the largest first; each is a program of its own


def block_sizes(total: int, num_experts: int) -> tuple[int, ...]:
    """Rows per block: large ones use the processor well, small ones waste less on an expert's rest.

    Args:
        total: Rows of all experts together.
        num_experts: The experts E.
    """
    if not isinstance(total, int):  # a symbolic size of `jax.export`
        return (128, 32)
    mean = total // num_experts
    if mean >= 1024:
        return (1024, 128, 32)
    if mean >= 256:
        return (512, 128, 32)
    if mean >= 32:
        return (128, 64, 32)
    return (32, 8) if mean >= 8 else (8,)


def row_padding(total: int, num_experts: int) -> int:
    """Rows that must follow the last one, so that no block reaches past the array."""
    return block_sizes(total, num_experts)[0]


def walk(tokens: Tensor, rows: Rows, stages: Sequence[Stage]) -> Tensor:
    """Applies each token's experts and sums what they give, weighted.

    Args:
        tokens: `(N, d)`.
        rows: who goes where, with which weight, and `row_padding` empty slots behind the last one.
        stages: the layers of the experts.

    Returns:
        `(N, out)`.
    """
    weights, slots, ends = rows.weights, rows.slots, rows.ends
    if tokens.shape[0] == 0:  # there is no row that an empty slot could hold
        return jnp.zeros((0, stages[-1].kernels[0].shape[-1]), tokens.dtype)
    total = weights.shape[0] * weights.shape[1]
    static = _Static(tuple(stage.activation for stage in stages), block_sizes(total, ends.shape[0]))
    layers = [(stage.kernels, stage.biases) for stage in stages]
    scales = [stage.scale for stage in stages]
    return _walk(static, tokens, weights, layers, scales, slots, ends)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(
    static: _Static,
    tokens: Tensor,
    weights: Tensor,
    layers: Any,
    scales: Any,
    slots: Slots,
    ends: Tensor,
) -> Tensor:
    return _forward(static, tokens, weights, layers, scales, slots, ends, keep=False)[0]


def _walk_forward(static: _Static, *inputs: Any) -> tuple[Tensor, Any]:
    sums, kept = _forward(static, *inputs, keep=True)  # type: ignore[misc]
    return sums, (*inputs, kept)


def _forward(
    static: _Static,
    tokens: Tensor,
    weights: Tensor,
    layers: Any,
    scales: Any,
    slots: Slots,
    ends: Tensor,
    keep: bool,
) -> tuple[Tensor, Any]:
    """Returns the tokens' sums and, with `keep`, what each activation was applied to, by slot."""
    token_of, _ = _assignments(slots, weights)

    def block(size: int, expert: Any, at: Tensor, end: Tensor, carry: Any) -> Any:
        outputs, kept = carry
        hidden, sums = _take(tokens, _read(token_of, at, size)), []
        stages = zip(static.activations, scales, expert, strict=True)
        for activation, scale, (kernels, biases) in stages:
            before = _linear(hidden, kernels, biases)
            sums.append(before)
            hidden = _activated(activation, before, _read(scale, at, size))
        kept = [_write(all_, new, at) for all_, new in zip(kept, sums[: len(kept)], strict=True)]
        return _write(outputs, hidden, at), kept

    widths = [[kernel.shape[-1] for kernel in kernels] for kernels, _ in layers]

    def empty(width: int) -> Tensor:
        return jnp.zeros((token_of.shape[0], width), tokens.dtype)

    # A last layer that is linear needs nothing for its backward pass.
    remembered = widths if static.activations[-1] is not None else widths[:-1]
    kept = [tuple(empty(width) for width in stage) for stage in remembered] if keep else []
    start = (empty(widths[-1][0]), kept)

    def over_blocks(expert: Any, index: Tensor, begin: Tensor, end: Tensor, carry: Any) -> Any:
        del index
        return _over_blocks(block, static.block_sizes, expert, begin, end, carry)

    outputs, kept = _over_experts(over_blocks, ends, layers, start)
    by_choice = zip(_by_choice(outputs, slots, weights), weights.T, strict=True)
    wide = jnp.promote_types(tokens.dtype, jnp.float32)
    sums = sum(chosen.astype(wide) * weight[:, None] for chosen, weight in by_choice)
    return sums.astype(tokens.dtype), kept


class _Tape(NamedTuple):
    """What a backward walk reads, of all slots."""

    activations: tuple[Callable[..., Tensor] | None, ...]
    scales: Any
    kept: Any  # what each activation was applied to
    tokens: Tensor
    upstream: Tensor  # by token
    token_of: Tensor
    weight_of: Tensor

    @property
    def wide(self) -> Any:
        """The dtype that sums are taken in."""
        return jnp.promote_types(self.tokens.dtype, jnp.float32)


def _walk_backward(static: _Static, residuals: Any, cotangent: Tensor) -> Any:
    tokens, weights, layers, scales, slots, ends, kept = residuals
    token_of, weight_of = _assignments(slots, weights)
    tape = _Tape(static.activations, scales, kept, tokens, cotangent, token_of, weight_of)

    def over_blocks(expert: Any, index: Tensor, begin: Tensor, end: Tensor, carry: Any) -> Any:
        by_row, by_layer = carry
        slopes = jax.tree.map(lambda all_: jnp.zeros(all_.shape[1:], tape.wide), by_layer)
        block = partial(_backward_block, tape)
        carry = _over_blocks(block, static.block_sizes, expert, begin, end, (by_row, slopes))
        by_row, slopes = carry
        return by_row, jax.tree.map(
            lambda all_, new: lax.dynamic_update_index_in_dim(
                all_, new.astype(all_.dtype), index, 0
            ),
            by_layer,
            slopes,
        )

    by_row = (
        jnp.zeros((token_of.shape[0], tokens.shape[-1]), tokens.dtype),
        jnp.zeros(token_of.shape, tape.wide),
        jax.tree.map(jnp.zeros_like, scales),
    )
    by_layer = jax.tree.map(jnp.zeros_like, layers)
    (by_slot, by_weight, by_scales), by_layer = _over_experts(
        over_blocks, ends, layers, (by_row, by_layer)
    )
    by_tokens = sum(chosen.astype(tape.wide) for chosen in _by_choice(by_slot, slots, weights))
    by_weights = jnp.stack(list(_by_choice(by_weight, slots, weights)), axis=-1)
    return (
        by_tokens.astype(tokens.dtype),
        by_weights.astype(weights.dtype),
        by_layer,
        by_scales,
        None,
        None,
    )


def _backward_block(
    tape: _Tape, size: int, expert: Any, at: Tensor, end: Tensor, carry: Any
) -> Any:
    """The gradients of one block of an expert's rows; rows past its end count as 0."""
    (by_slot, by_weight, by_scales), slopes = carry
    by_scales, slopes = list(by_scales), list(slopes)
    is_own = (at + jnp.arange(size) < end)[:, None]

    def own(rows: Tensor) -> Tensor:
        return jnp.where(is_own, rows, 0)

    token = _read(tape.token_of, at, size)
    weight = own(_read(tape.weight_of, at, size)[:, None])
    unweighted = own(_take(tape.upstream, token))
    # What went into each layer, and out of the last one if that is activated.
    inputs, pullbacks = [own(_take(tape.tokens, token))], []
    for activation, scale, sums in zip(tape.activations, tape.scales, tape.kept, strict=False):
        own_sums = tuple(own(_read(each, at, size)) for each in sums)
        hidden, pullback = jax.vjp(
            partial(_activated, activation), own_sums, _read(scale, at, size)
        )
        inputs.append(hidden)
        pullbacks.append(pullback)

    if len(pullbacks) == len(expert):
        upstream = unweighted
        slope = jnp.sum(inputs.pop() * unweighted, -1, dtype=tape.wide)
    else:
        # The slope of an assignment's weight is <output, upstream>. The output of a linear last
        # layer is not kept: <h W + b, upstream> = <h, upstream W^T> + <b, upstream>.
        (kernel,), biases = expert[-1]
        upstream = jnp.matmul(unweighted, kernel.T)
        slope = jnp.sum(inputs[-1] * upstream, -1, dtype=tape.wide)
        for bias in biases:
            slope = slope + jnp.sum(unweighted * bias, -1, dtype=tape.wide)
        weighted = (unweighted * weight).astype(tape.tokens.dtype)
        slopes[-1] = _added(slopes[-1], inputs.pop(), (weighted,), tape.wide)
    upstream = (upstream * weight).astype(tape.tokens.dtype)
    for index in reversed(range(len(pullbacks))):
        by_sums, by_scale = pullbacks[index](upstream)
        by_scales[index] = _write(by_scales[index], by_scale, at)
        slopes[index] = _added(slopes[index], inputs.pop(), by_sums, tape.wide)
        kernels, _ = expert[index]
        upstream = sum(
            jnp.matmul(each, kernel.T) for each, kernel in zip(by_sums, kernels, strict=True)
        )
    by_slot, by_weight = _write((by_slot, by_weight), (upstream, slope), at)
    return (by_slot, by_weight, by_scales), slopes


_walk.defvjp(_walk_forward, _walk_backward)


def _assignments(slots: Slots, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The token in each slot and the weight of its assignment; of an empty slot, some."""
    count, top_k = weights.shape
    assignment = jnp.minimum(slots.assignment, count * top_k - 1)
    return assignment % count, _take(weights.T.reshape(-1), assignment)


def _by_choice(rows: Tensor, slots: Slots, weights: Tensor) -> Iterator[Tensor]:
    """What the slots hold for each token's first choice, second choice and so on; 0 for none.

    One by one: a single gather of all choices takes XLA:CPU ten times as long.
    """
    count, top_k = weights.shape
    for slot in slots.slot_of.reshape(top_k, count):
        is_kept = slot < rows.shape[0]
        chosen = _take(rows, jnp.where(is_kept, slot, 0))
        yield jnp.where(is_kept.reshape(-1, *[1] * (rows.ndim - 1)), chosen, 0)


def _added(slopes: Any, inputs: Tensor, by_sums: Any, dtype: Any) -> Any:
    """Adds a block's share to the slopes of a layer's kernels and biases."""
    by_kernels, by_biases = slopes
    return (
        tuple(
            slope + jnp.matmul(inputs.T, each, preferred_element_type=dtype)
            for slope, each in zip(by_kernels, by_sums, strict=True)
        ),
        tuple(
            slope + jnp.sum(each, axis=0, dtype=dtype)
            for slope, each in zip(by_biases, by_sums, strict=False)
        ),
    )


def _take(rows: Tensor, indices: Tensor) -> Tensor:
    return rows.at[indices].get(mode="promise_in_bounds")


def _over_experts(step: Callable[..., Any], ends: Tensor, weights: Any, carry: Any) -> Any:
    """Folds over the experts that have rows; the weights of each are copied once, not per block."""
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    has_rows = ends > starts
    busy = jnp.argsort(jnp.logical_not(has_rows), stable=True)  # those with rows first, in order

    def body(place: Tensor, carry: Any) -> Any:
        index = busy[place]
        expert = jax.tree.map(
            lambda all_: lax.dynamic_index_in_dim(all_, index, 0, keepdims=False), weights
        )
        return step(expert, index, starts[index], ends[index], carry)

    return lax.fori_loop(0, jnp.sum(has_rows), body, carry)


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

        def has_enough(state: Any, least: int = least) -> Tensor:
            return end - state[0] >= least

        def take(state: Any, size: int = size) -> Any:
            at, carry = state
            return at + size, block(size, expert, at, end, carry)

        state = lax.while_loop(has_enough, take, state)
    return state[1]


def _linear(rows: Tensor, kernels: Any, biases: Any) -> tuple[Tensor, ...]:
    if not biases:
        return tuple(rows @ kernel for kernel in kernels)
    return tuple(rows @ kernel + bias for kernel, bias in zip(kernels, biases, strict=True))


def _activated(activation: Any, sums: tuple[Tensor, ...], scale: Tensor | None) -> Tensor:
    hidden = sums[0] if activation is None else activation(*sums)
    return hidden if scale is None else hidden * scale


def _read(rows: Tensor, at: Tensor, size: int) -> Tensor:
    """A block of rows; None stays None."""
    return None if rows is None else lax.dynamic_slice_in_dim(rows, at, size)


def _write(rows: Any, block: Any, at: Tensor) -> Any:
    """Writes a block of rows; trees of them go leaf by leaf, and None stays None."""
    return jax.tree.map(
        lambda all_, new: lax.dynamic_update_slice_in_dim(all_, new, at, 0), rows, block
    )


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def with_gradient(
    function: Callable[..., Tensor],
    gradient: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    fixed: tuple[Tensor, ...],
) -> Tensor:
    """function(*inputs, *fixed), whose gradient to inputs is gradient(upstream, *inputs, *fixed).

    `keras.ops.custom_gradient` would close over `fixed`, which leaks out of `jax.checkpoint`.
    """
    del gradient
    return function(*inputs, *fixed)


def _with_gradient_forward(
    function: Any, gradient: Any, inputs: Any, fixed: Any
) -> tuple[Tensor, Any]:
    return with_gradient(function, gradient, inputs, fixed), (inputs, fixed)


def _with_gradient_backward(
    function: Any, gradient: Any, residuals: Any, upstream: Tensor
) -> tuple[Any, None]:
    del function
    inputs, fixed = residuals
    return gradient(upstream, *inputs, *fixed), None


with_gradient.defvjp(_with_gradient_forward, _with_gradient_backward)


def grouped_matmul(rows: Tensor, kernel: Tensor, ends: Tensor) -> Tensor:
    """XLA's own grouped matmul: good on TPU, lowered to E dense matmuls on a CPU."""
    return lax.ragged_dot(rows, kernel, jnp.diff(ends, prepend=0))


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether what is computed from a tensor, traced or not, is computed on a CPU."""
    del tensor
    return jax.default_backend() == "cpu"


def may_have_grouped_matmul() -> bool:
    """Whether a probe of `grouped_matmul` is worth its time on this device."""
    return jax.default_backend() != "cpu"


def eagerly(function: Callable[[], Any]) -> Any:
    """Runs a function now, also while a program is being traced."""
    with jax.ensure_compile_time_eval():
        return jax.tree.map(jax.block_until_ready, function())


def value_and_gradients(function: Callable[..., Tensor], *arguments: Tensor) -> tuple[Any, Any]:
    """The value of a function, and the gradients of the sum of its squares."""
    gradients = jax.grad(lambda *a: jnp.sum(function(*a) ** 2), tuple(range(len(arguments))))
    return function(*arguments), gradients(*arguments)
