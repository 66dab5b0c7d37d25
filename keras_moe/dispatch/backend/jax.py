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

import contextlib
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from keras_moe.core.types import Tensor
from keras_moe.dispatch.backend import portable
from keras_moe.dispatch.backend.portable import (  # noqa: F401
    inverse_permutation,
    is_recomputing,
    is_traced_for_export,
    reach,
    segment_sum,
    sort_for_export,
    sum_over_replicas,
    without_autocast,
)
from keras_moe.dispatch.layout import Rows, Slots, Stage

WALKS = HAS_GROUPED_MATMUL = DIVIDES = True


class _Static(NamedTuple):
    """Settings that a walk is compiled for."""

    activations: tuple[Callable[..., Tensor] | None, ...]
    block_sizes: tuple[int, ...]  # the largest first; each is a program of its own
    is_training: bool = False


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
    with _naming_the_way():
        return _walk(static, tokens, weights, layers, scales, slots, ends)[0]


@contextlib.contextmanager
def _naming_the_way() -> Iterator[None]:
    """Says what to do where JAX differentiates in forward mode, which custom gradients have not."""
    try:
        yield
    except TypeError as error:
        if "forward-mode" not in str(error):
            raise
        raise TypeError(
            "Forward-mode differentiation, as of `jax.jvp` and `jax.jacfwd`, needs "
            "`dispatch='dense'` or 'lookup', or with a capacity 'einsum': other dispatchers have "
            "a gradient of their own."
        ) from error


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _walk(
    static: _Static,
    tokens: Tensor,
    weights: Tensor,
    layers: Any,
    scales: Any,
    slots: Slots,
    ends: Tensor,
) -> tuple[Tensor, Any]:
    """The tokens' sums and, in training, what each activation was applied to, by slot."""
    token_of, _ = _assignments(slots, weights)

    def block(
        size: int, expert: Any, at: Tensor, end: Tensor, state: Any, totals: Any
    ) -> tuple[Any, Any]:
        outputs, kept = state
        hidden, all_sums = _take(tokens, lax.dynamic_slice_in_dim(token_of, at, size)), []
        stages = zip(static.activations, scales, expert, strict=True)
        for activation, scale, (kernels, biases) in stages:
            sums = _linear(hidden, kernels, biases)
            all_sums.append(sums)
            factors = None if scale is None else _read(scale, at, size)
            hidden = _activated(activation, sums, factors)
        kept = [_write(rows, sums, at) for rows, sums in zip(kept, all_sums, strict=False)]
        return (_write(outputs, hidden, at), kept), totals

    widths = [tuple(kernel.shape[-1] for kernel in kernels) for kernels, _ in layers]
    # A last layer that is linear needs nothing for its backward pass.
    remembered = widths if static.activations[-1] is not None else widths[:-1]
    kept = jax.tree.map(
        lambda width: jnp.zeros((token_of.shape[0], width), tokens.dtype),
        remembered if static.is_training else [],
    )
    outputs = jnp.zeros((token_of.shape[0], widths[-1][0]), tokens.dtype)
    wide = jnp.promote_types(tokens.dtype, jnp.float32)
    (outputs, kept), _ = _over_blocks(
        block, static.block_sizes, ends, layers, (outputs, kept), (), tokens.dtype, wide
    )
    by_choice = zip(_by_choice(outputs, slots, weights), weights.T, strict=True)
    sums = sum(chosen.astype(wide) * weight[:, None] for chosen, weight in by_choice)
    return sums.astype(tokens.dtype), kept


def _walk_forward(static: _Static, *inputs: Any) -> tuple[Any, Any]:
    # Not the plain function: for second derivatives, JAX differentiates what stands here.
    sums, kept = _walk(static._replace(is_training=True), *inputs)
    return (sums, kept if static.is_training else []), (*inputs, kept)


class _Tape(NamedTuple):
    """Arrays that a backward walk reads, with an entry for every slot."""

    activations: tuple[Callable[..., Tensor] | None, ...]
    scales: Any
    kept: Any  # what each activation was applied to
    tokens: Tensor
    grad_sums: Tensor  # by token
    token_of: Tensor
    weight_of: Tensor

    @property
    def wide(self) -> Any:
        """The dtype that sums are taken in."""
        return jnp.promote_types(self.tokens.dtype, jnp.float32)


def _walk_backward(static: _Static, residuals: Any, cotangents: Any) -> Any:
    *inputs, slots, ends, kept = residuals
    return *_gradients(static, tuple(inputs), slots, ends, kept, cotangents[0]), None, None


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(
    static: _Static, inputs: Any, slots: Slots, ends: Tensor, kept: Any, grad_sums: Tensor
) -> Any:
    """The gradients of the walk by its inputs, which are a walk too."""
    tokens, weights, layers, scales = inputs
    token_of, weight_of = _assignments(slots, weights)
    tape = _Tape(static.activations, scales, kept, tokens, grad_sums, token_of, weight_of)
    start = (
        jnp.zeros((token_of.shape[0], tokens.shape[-1]), tokens.dtype),
        jnp.zeros(token_of.shape, tape.wide),
        jax.tree.map(jnp.zeros_like, scales),
    )
    block = partial(_backward_block, tape)
    (grad_rows, grad_weight_of, grad_scales), grad_layers = _over_blocks(
        block,
        static.block_sizes,
        ends,
        layers,
        start,
        jax.tree.map(jnp.zeros_like, layers),
        tokens.dtype,
        tape.wide,
    )
    grad_tokens = sum(chosen.astype(tape.wide) for chosen in _by_choice(grad_rows, slots, weights))
    grad_weights = jnp.stack(_by_choice(grad_weight_of, slots, weights), axis=-1)
    return (
        grad_tokens.astype(tokens.dtype),
        grad_weights.astype(weights.dtype),
        grad_layers,
        grad_scales,
    )


def _gradients_forward(static: _Static, *arguments: Any) -> tuple[Any, Any]:
    inputs, slots, ends, _, grad_sums = arguments
    return _gradients(static, *arguments), (inputs, slots, ends, grad_sums)


def _gradients_backward(static: _Static, residuals: Any, cotangents: Any) -> Any:
    """Second derivatives: those of the same sums in operations that JAX differentiates itself."""
    inputs, slots, ends, grad_sums = residuals

    def sums(tokens: Tensor, weights: Tensor, layers: Any, scales: Any) -> Tensor:
        parts = zip(layers, static.activations, scales, strict=True)
        stages = [
            Stage(kernels, biases, activation, scale)
            for (kernels, biases), activation, scale in parts
        ]
        return portable.walk(tokens, Rows(weights, slots, ends), stages)

    def gradients(inputs: Any, grad_sums: Tensor) -> Any:
        return jax.vjp(sums, *inputs)[1](grad_sums)

    grad_inputs, grad_grad_sums = jax.vjp(gradients, inputs, grad_sums)[1](cotangents)
    return grad_inputs, None, None, None, grad_grad_sums


_gradients.defvjp(_gradients_forward, _gradients_backward)


def _backward_block(
    tape: _Tape, size: int, expert: Any, at: Tensor, end: Tensor, state: Any, grad_expert: Any
) -> tuple[Any, Any]:
    """The gradients of one block of an expert's rows; rows past its end count as 0."""
    grad_rows, grad_weight_of, grad_scales = state
    grad_scales, grad_expert = list(grad_scales), list(grad_expert)
    is_row = (at + jnp.arange(size) < end)[:, None]

    def zero_past_end(rows: Tensor) -> Tensor:
        return jnp.where(is_row, rows, 0)

    token = _read(tape.token_of, at, size)
    weight = zero_past_end(_read(tape.weight_of, at, size)[:, None])
    unweighted = zero_past_end(_take(tape.grad_sums, token))
    # What went into each layer, and out of the last one if that is activated.
    inputs, pullbacks = [zero_past_end(_take(tape.tokens, token))], []
    for activation, scale, sums in zip(tape.activations, tape.scales, tape.kept, strict=False):
        inner_sums = tuple(zero_past_end(_read(rows, at, size)) for rows in sums)
        hidden, pullback = jax.vjp(
            partial(_activated, activation), inner_sums, _read(scale, at, size)
        )
        inputs.append(hidden)
        pullbacks.append(pullback)

    if len(pullbacks) == len(expert):
        grad_hidden = unweighted
        grad_weight = jnp.sum(inputs.pop() * unweighted, -1, dtype=tape.wide)
    else:
        # The gradient of an assignment's weight is <output, upstream>. The output of a linear last
        # layer is not kept: <h W + b, upstream> = <h, upstream W^T> + <b, upstream>.
        (kernel,), biases = expert[-1]
        grad_hidden = jnp.matmul(unweighted, kernel.T)
        grad_weight = jnp.sum(inputs[-1] * grad_hidden, -1, dtype=tape.wide)
        for bias in biases:
            grad_weight = grad_weight + jnp.sum(unweighted * bias, -1, dtype=tape.wide)
        weighted = (unweighted * weight).astype(tape.tokens.dtype)
        grad_expert[-1] = _added(grad_expert[-1], inputs.pop(), (weighted,), tape.wide)
    grad_hidden = (grad_hidden * weight).astype(tape.tokens.dtype)
    for index in reversed(range(len(pullbacks))):
        grad_sums, grad_scale = pullbacks[index](grad_hidden)
        grad_scales[index] = _write(grad_scales[index], grad_scale, at)
        grad_expert[index] = _added(grad_expert[index], inputs.pop(), grad_sums, tape.wide)
        kernels, _ = expert[index]
        grad_hidden = sum(
            jnp.matmul(grad, kernel.T) for grad, kernel in zip(grad_sums, kernels, strict=True)
        )
    grad_rows, grad_weight_of = _write((grad_rows, grad_weight_of), (grad_hidden, grad_weight), at)
    return (grad_rows, grad_weight_of, grad_scales), grad_expert


_walk.defvjp(_walk_forward, _walk_backward)


def _assignments(slots: Slots, weights: Tensor) -> tuple[Tensor, Tensor]:
    """The token in each slot and the weight of its assignment; of an empty slot, some."""
    count, top_k = weights.shape
    assignment = jnp.minimum(slots.assignment, count * top_k - 1)
    return assignment % count, _take(weights.T.reshape(-1), assignment)


def _by_choice(rows: Tensor, slots: Slots, weights: Tensor) -> list[Tensor]:
    """Rows of each token's first choice, second choice and so on; 0 where it has none.

    One by one: a single gather of all choices takes XLA:CPU ten times as long.
    """
    count, top_k = weights.shape
    chosen = []
    for slot in slots.slot_of.reshape(top_k, count):
        is_kept = slot < rows.shape[0]
        values = _take(rows, jnp.where(is_kept, slot, 0))
        chosen.append(jnp.where(is_kept.reshape(-1, *[1] * (rows.ndim - 1)), values, 0))
    return chosen


def _added(totals: Any, inputs: Tensor, grad_sums: Any, dtype: Any) -> Any:
    """Adds a block's share to the gradients of a layer's kernels and biases."""
    grad_kernels, grad_biases = totals
    return (
        tuple(
            total + jnp.matmul(inputs.T, grad, preferred_element_type=dtype)
            for total, grad in zip(grad_kernels, grad_sums, strict=True)
        ),
        tuple(
            total + jnp.sum(grad, axis=0, dtype=dtype)
            for total, grad in zip(grad_biases, grad_sums, strict=False)
        ),
    )


def _take(rows: Tensor, indices: Tensor) -> Tensor:
    # An array of NumPy's comes here where JAX differentiates at one without `jit`.
    return jnp.asarray(rows).at[indices].get(mode="promise_in_bounds")


def _over_blocks(
    block: Callable[..., tuple[Any, Any]],
    sizes: tuple[int, ...],
    ends: Tensor,
    layers: Any,
    state: Any,
    totals: Any,
    dtype: Any,
    wide: Any,
) -> tuple[Any, Any]:
    """Folds over blocks of rows, expert by expert: large blocks while they pay, then smaller ones.

    Args:
        block: `(size, expert, at, end, state, sums) -> (state, sums)`; `expert` holds the layers of
            one, which are copied once and not per block.
        sizes: rows per block, the largest first.
        ends: `(E,)`, where each expert's rows end.
        layers: the layers of all experts.
        state: what blocks read and write.
        totals: a tree of `(E, ...)`, what blocks add up for each expert.
        dtype: what an expert's layers are cast to.
        wide: what the totals are added up in.

    Returns:
        The last state, and the totals.
    """
    starts = jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])
    has_rows = ends > starts
    busy = jnp.argsort(jnp.logical_not(has_rows), stable=True)  # those with rows first, in order

    def one_expert(place: Tensor, carry: Any) -> Any:
        state, totals = carry
        index = busy[place]
        end = ends[index]
        take = partial(lax.dynamic_index_in_dim, index=index, axis=0, keepdims=False)
        expert = jax.tree.map(lambda bank: take(bank).astype(dtype), layers)
        sums = jax.tree.map(lambda total: jnp.zeros(total.shape[1:], wide), totals)
        loop = (starts[index], state, sums)
        for size in sizes:
            # A larger block is worth it if smaller ones would compute as many rows.
            least = 1 if size == sizes[-1] else size - sizes[-1] + 1

            def has_enough(loop: Any, least: int = least) -> Tensor:
                return end - loop[0] >= least

            def next_block(loop: Any, size: int = size) -> Any:
                at, state, sums = loop
                return (at + size, *block(size, expert, at, end, state, sums))

            loop = lax.while_loop(has_enough, next_block, loop)
        _, state, sums = loop
        sums = jax.tree.map(lambda total, new: new.astype(total.dtype), totals, sums)
        write = partial(lax.dynamic_update_index_in_dim, index=index, axis=0)
        return state, jax.tree.map(write, totals, sums)

    return lax.fori_loop(0, jnp.sum(has_rows), one_expert, (state, totals))


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
    write = partial(lax.dynamic_update_slice_in_dim, start_index=at, axis=0)
    return jax.tree.map(write, rows, block)


def with_gradient(
    function: Callable[..., Tensor],
    gradient: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    fixed: tuple[Tensor, ...],
) -> Tensor:
    """function(*inputs, *fixed), whose gradient to inputs is gradient(upstream, *inputs, *fixed).

    `keras.ops.custom_gradient` would close over `fixed`, which leaks out of `jax.checkpoint`.
    """
    with _naming_the_way():
        return _with_gradient(function, gradient, inputs, fixed)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_gradient(function: Any, gradient: Any, inputs: Any, fixed: Any) -> Tensor:
    return function(*inputs, *fixed)


def _with_gradient_forward(
    function: Any, gradient: Any, inputs: Any, fixed: Any
) -> tuple[Tensor, Any]:
    return _with_gradient(function, gradient, inputs, fixed), (inputs, fixed)


def _with_gradient_backward(
    function: Any, gradient: Any, residuals: Any, upstream: Tensor
) -> tuple[Any, None]:
    inputs, fixed = residuals
    return gradient(upstream, *inputs, *fixed), None


_with_gradient.defvjp(_with_gradient_forward, _with_gradient_backward)


def grouped_matmul(rows: Tensor, kernel: Tensor, ends: Tensor) -> Tensor:
    """A kernel of ours on an NVIDIA GPU; elsewhere XLA's own, which is good on a TPU only."""
    # A program that is exported for any number of rows is for any device, too.
    if _has_tensor_cores() and isinstance(rows.shape[0], int):
        from keras_moe.dispatch.backend import jax_gpu

        return jax_gpu.grouped_matmul(rows, kernel, ends)
    return lax.ragged_dot(rows, kernel, jnp.diff(ends, prepend=0))


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether what is computed from a tensor, traced or not, is computed on a CPU."""
    return jax.default_backend() == "cpu"


def may_have_grouped_matmul(is_known: bool) -> bool:
    """Whether this kind of device has a `grouped_matmul` that beats a walk.

    Args:
        is_known: whether the number of rows is.
    """
    return jax.default_backend() == "tpu" or (is_known and _has_tensor_cores())


@functools.cache
def _has_tensor_cores() -> bool:
    """Whether the default device is an NVIDIA GPU of the Ampere generation or later."""
    if jax.default_backend() != "gpu":
        return False
    device = jax.devices()[0]
    capability = str(getattr(device, "compute_capability", "0"))  # of AMD's: a name, as "gfx942"
    if capability.replace(".", "").isdigit() and float(capability) >= 8.0:
        return True
    warnings.warn(  # once, as the result is kept
        "keras_moe has kernels for NVIDIA GPUs from Ampere on, compute capability 8.0, and not for "
        f"{device.device_kind}, {capability}: experts run one after another, right and slower.",
        stacklevel=2,
    )
    return False


def eagerly(function: Callable[[], Any]) -> Any:
    """Runs a function now, also while a program is being traced."""
    # In a thread of its own, which traces nothing: kernels of Pallas fail in what JAX has for this,
    # `ensure_compile_time_eval`.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(lambda: jax.tree.map(jax.block_until_ready, function())).result()


def value_and_gradients(function: Callable[..., Tensor], *arguments: Tensor) -> tuple[Any, Any]:
    """The value of a function, and the gradients of the sum of its squares."""
    gradients = jax.grad(lambda *a: jnp.sum(function(*a) ** 2), tuple(range(len(arguments))))
    return function(*arguments), gradients(*arguments)


def on_each_device(
    function: Callable[..., Any], mesh: Any, inputs: Any, inputs_by: Any, outputs_by: Any
) -> Any:
    """Runs a function on each device of a mesh, on its part of the inputs.

    Args:
        function: of the parts of the inputs.
        mesh: a `keras.distribution.DeviceMesh`.
        inputs: a tuple of trees of arrays.
        inputs_by: for each, the mesh's axis that divides each axis of an array, or None.
        outputs_by: the same for what the function returns.
    """

    def specs(tree: Any) -> Any:
        is_leaf = isinstance(tree, tuple) and all(a is None or isinstance(a, str) for a in tree)
        return PartitionSpec(*tree) if is_leaf else type(tree)(map(specs, tree))

    return jax.shard_map(
        function,
        mesh=mesh.backend_mesh,
        in_specs=specs(inputs_by),
        out_specs=specs(outputs_by),
        check_vma=False,  # loops that begin with zeros, and gradients of our own
    )(*inputs)


def device_index(axes: tuple[str, ...]) -> Tensor:
    """Where a device stands along axes of the mesh, in `on_each_device`."""
    return lax.axis_index(axes)


def sum_over_devices(value: Tensor, axes: tuple[str, ...]) -> Tensor:
    """The sum over the devices along axes of the mesh, in `on_each_device`."""
    return lax.psum(value, axes)
