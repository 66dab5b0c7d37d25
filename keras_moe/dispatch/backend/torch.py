"""Dropless dispatch on PyTorch: gather, per layer one matmul for each expert, combine.

Eager PyTorch has no static shapes to keep: each expert multiplies exactly its own rows, and nothing
is padded. The loop has a backward pass of its own, since autograd would make a gradient as large as
the whole bank for each expert that is indexed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Any, TypeAlias

import torch

from keras_moe.core.types import Tensor
from keras_moe.dispatch.backend import portable
from keras_moe.dispatch.backend.portable import (  # noqa: F401
    DIVIDES,
    device_index,
    on_each_device,
    sum_over_devices,
)
from keras_moe.dispatch.layout import Rows, Stage

WALKS = HAS_GROUPED_MATMUL = True

_AUTOCASTS = ("cpu", "cuda", "mps", "xpu")  # devices

Bounds: TypeAlias = list[tuple[int, int]]  # where each expert's rows begin and end


def row_padding(total: int, num_experts: int) -> int:
    """Rows that must follow the last one: none."""
    return 0


def reach(outputs: Tensor, variables: Sequence[Tensor]) -> Tensor:
    """Lets the outputs depend on variables that did not take part in them: their gradient is 0.

    PyTorch has no gradient for what a batch does not reach, and Keras's optimizers then leave such
    a variable out: no momentum, no decay, and what was accumulated for it is lost.
    """
    return _Reach.apply(outputs, *variables)


class _Reach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, outputs: Tensor, *variables: Tensor) -> Tensor:
        ctx.save_for_backward(*variables)
        return outputs.view_as(outputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        zeros = (
            torch.zeros_like(each) if is_needed else None
            for each, is_needed in zip(ctx.saved_tensors, ctx.needs_input_grad[1:], strict=True)
        )
        return upstream, *zeros


@torch.compiler.disable  # the loop's bounds are data; `torch.compile` goes on after it
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
    count, top_k = weights.shape
    if count == 0:
        weights_of_experts = [each for stage in stages for each in (*stage.kernels, *stage.biases)]
        nothing = tokens.new_zeros(0, stages[-1].kernels[0].shape[-1])
        return reach(nothing, weights_of_experts)
    # An assignment without an expert finds its zero in the last slot, which then has none either.
    slot_of = slots.slot_of.clamp(max=count * top_k - 1).view(top_k, count)
    token_of = slots.assignment % count
    bounds = _bounds(ends)
    if _is_transformed():
        return _plain_walk(tokens, weights, token_of, slot_of, bounds, stages)
    *inner, last = stages
    is_linear = bool(inner) and last.activation is None and last.scale is None
    rows, slots_of_tokens = tokens, [token_of, slot_of]
    for stage in inner if is_linear else stages:
        sums = _GroupedLinear.apply(
            rows, bounds, len(stage.kernels), *slots_of_tokens, *stage.kernels, *stage.biases
        )
        rows = sums[0] if stage.activation is None else stage.activation(*sums)
        rows = rows if stage.scale is None else rows * stage.scale
        slots_of_tokens = []
    if is_linear:
        bias = last.biases[0] if last.biases else None
        return _LinearCombine.apply(
            rows, last.kernels[0], bias, weights, slots.assignment, token_of, slot_of, bounds
        )
    if last.activation is not None:  # which need not be 0 at 0
        rows = _with_zero_tail(rows, bounds)
    return _Combine.apply(rows, weights, slots.assignment, token_of, slot_of, bounds[-1][1])


class _GroupedLinear(torch.autograd.Function):
    """rows[start:end] @ kernel[e] + bias[e] for the bounds of each expert e; 0 past the last.

    Of several kernels, one after another for the same rows. With `token_of` and `slot_of` the
    inputs are tokens, and an expert's rows are gathered when it is their turn: all of them never
    stand in memory, and what was gathered is still in the cache when it is multiplied.
    """

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, bounds: Bounds, count: int, *more: Tensor
    ) -> tuple[Tensor, ...]:
        """`more` is token_of and slot_of, or neither; the kernels; a bias for each, or none."""
        slots, kernels, biases = _sorted_out(more, count)
        ctx.save_for_backward(inputs, *more)
        ctx.bounds, ctx.count = bounds, count
        total = slots[0].shape[0] if slots else inputs.shape[0]
        outputs = tuple(
            _empty_with_zero_tail(inputs, total, kernel.shape[-1], bounds) for kernel in kernels
        )
        for expert, start, end in _busy(bounds):
            rows = _rows(inputs, slots, start, end)
            for index, kernel in enumerate(kernels):
                bias = biases[index][expert] if biases else None
                _linear(rows, kernel[expert], bias, outputs[index][start:end])
        return outputs

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        inputs, *more = ctx.saved_tensors
        slots, kernels, biases = _sorted_out(more, ctx.count)
        if torch.is_grad_enabled():  # this gradient will be differentiated
            token_of, *_ = slots or (None,)
            grads = _gradients(
                lambda inputs, *weights: tuple(
                    _plain_linear(inputs, token_of, ctx.bounds, kernel, bias)
                    for kernel, bias in _pairs(weights, ctx.count)
                ),
                (inputs, *kernels, *biases),
                upstream,
            )
            return grads[0], None, None, *[None] * len(slots), *grads[1:]
        needs_inputs, needs_weights = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:])
        upstream = tuple(each.contiguous() for each in upstream)
        total = upstream[0].shape[0]
        grad_inputs = None
        weights = (*kernels, *biases)
        grad_weights = [_zeros_where_idle(each, ctx.bounds) for each in weights if needs_weights]
        grad_kernels, grad_biases = grad_weights[: ctx.count], grad_weights[ctx.count :]
        if needs_inputs:
            grad_rows = _empty_with_zero_tail(inputs, total, inputs.shape[1], ctx.bounds)
        for expert, start, end in _busy(ctx.bounds):
            parts = [each[start:end] for each in upstream]
            if needs_inputs:
                for index, (part, kernel) in enumerate(zip(parts, kernels, strict=True)):
                    # With beta 0, what stands there is ignored, even NaN.
                    kernel_of = kernel[expert].to(part.dtype)
                    grad_rows[start:end].addmm_(part, kernel_of.T, beta=min(index, 1))
            if needs_weights:
                rows = _rows(inputs, slots, start, end)
                for part, grad_kernel in zip(parts, grad_kernels, strict=True):
                    _mm(rows.T, part, grad_kernel[expert])
                for part, grad_bias in zip(parts, grad_biases, strict=False):
                    torch.sum(part, dim=0, dtype=grad_bias.dtype, out=grad_bias[expert])
        if needs_inputs:
            grad_inputs = _sums(grad_rows, slots[1]) if slots else grad_rows
        return (
            grad_inputs,
            None,
            None,
            *[None] * len(slots),
            *(grad_weights or [None] * len(weights)),
        )


class _LinearCombine(torch.autograd.Function):
    """A last layer that is linear, and each token's weighted sum over its slots.

    Its outputs are not kept: the gradient of a weight is
    <h W + b, upstream> = <h, upstream W^T> + <b, upstream>, and the first factor is needed anyway.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        kernel: Tensor,
        bias: Tensor | None,
        weights: Tensor,
        assignment: Tensor,
        token_of: Tensor,
        slot_of: Tensor,
        bounds: Bounds,
    ) -> Tensor:
        ctx.save_for_backward(hidden, kernel, bias, weights, assignment, token_of, slot_of)
        ctx.bounds = bounds
        outputs = _empty_with_zero_tail(hidden, hidden.shape[0], kernel.shape[-1], bounds)
        for expert, start, end in _busy(bounds):
            bias_of = None if bias is None else bias[expert]
            _linear(hidden[start:end], kernel[expert], bias_of, outputs[start:end])
        return _sums(outputs, slot_of, weights)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, kernel, bias, weights, assignment, token_of, slot_of = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient will be differentiated
            grads = _gradients(
                lambda hidden, kernel, bias, weights: _plain_sums(
                    _plain_linear(hidden, None, ctx.bounds, kernel, bias), slot_of, weights
                ),
                (hidden, kernel, bias, weights),
                upstream,
            )
            return *grads, None, None, None, None
        wide = torch.promote_types(hidden.dtype, torch.float32)
        weight_of = _by_slot(weights, assignment)
        grad_hidden = _empty_with_zero_tail(hidden, hidden.shape[0], hidden.shape[1], ctx.bounds)
        grad_kernel = _zeros_where_idle(kernel, ctx.bounds)
        grad_bias = None if bias is None else _zeros_where_idle(bias, ctx.bounds)
        # 0 in nobody's slots, whatever the token that fills them has.
        grad_weight = hidden.new_zeros(hidden.shape[0], dtype=wide)
        for expert, start, end in _busy(ctx.bounds):
            rows, grad_rows = hidden[start:end], grad_hidden[start:end]
            grad_outputs = upstream.index_select(0, token_of[start:end])
            torch.mm(grad_outputs, kernel[expert].T.to(grad_rows.dtype), out=grad_rows)
            grad_weight[start:end] = torch.linalg.vecdot(rows.to(wide), grad_rows.to(wide))
            if bias is not None:
                bias_of = bias[expert].to(hidden.dtype).to(wide)
                grad_weight[start:end] += grad_outputs.to(wide) @ bias_of
            grad_rows.mul_(weight_of[start:end])
            grad_outputs.mul_(weight_of[start:end])
            _mm(rows.T, grad_outputs, grad_kernel[expert])
            if grad_bias is not None:
                torch.sum(grad_outputs, dim=0, dtype=grad_bias.dtype, out=grad_bias[expert])
        grad_weights = grad_weight[slot_of].t().to(weights.dtype)
        return grad_hidden, grad_kernel, grad_bias, grad_weights, None, None, None, None


class _Combine(torch.autograd.Function):
    """Each token's weighted sum over its slots."""

    @staticmethod
    def forward(
        ctx: Any,
        outputs: Tensor,
        weights: Tensor,
        assignment: Tensor,
        token_of: Tensor,
        slot_of: Tensor,
        used: int,
    ) -> Tensor:
        ctx.save_for_backward(outputs, weights, assignment, token_of, slot_of)
        ctx.used = used
        return _sums(outputs, slot_of, weights)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        outputs, weights, assignment, token_of, slot_of = ctx.saved_tensors
        if torch.is_grad_enabled():  # this gradient will be differentiated
            grads = _gradients(
                lambda outputs, weights: _plain_sums(outputs, slot_of, weights),
                (outputs, weights),
                upstream,
            )
            return *grads, None, None, None, None
        wide = torch.promote_types(outputs.dtype, torch.float32)
        upstream_of = upstream.index_select(0, token_of)
        grad_weight = torch.linalg.vecdot(outputs.to(wide), upstream_of.to(wide))
        grad_weight[ctx.used :] = 0  # nobody's slots, whatever the token that fills them has
        grad_outputs = upstream_of.mul_(_by_slot(weights, assignment))
        return grad_outputs, grad_weight[slot_of].t().to(weights.dtype), None, None, None, None


# The same in operations that PyTorch differentiates itself, as often as one likes. They take more
# time and memory: every expert's rows, and each choice's, stand apart until they are joined.


def _plain_walk(
    tokens: Tensor,
    weights: Tensor,
    token_of: Tensor,
    slot_of: Tensor,
    bounds: Bounds,
    stages: Sequence[Stage],
) -> Tensor:
    rows = tokens.index_select(0, token_of)
    for stage in stages:
        sums = [
            _plain_linear(rows, None, bounds, kernel, bias)
            for kernel, bias in _pairs((*stage.kernels, *stage.biases), len(stage.kernels))
        ]
        rows = sums[0] if stage.activation is None else stage.activation(*sums)
        rows = rows if stage.scale is None else rows * stage.scale
    return _plain_sums(_with_zero_tail(rows, bounds), slot_of, weights)


def _plain_linear(
    inputs: Tensor, token_of: Tensor | None, bounds: Bounds, kernel: Tensor, bias: Tensor | None
) -> Tensor:
    """rows[start:end] @ kernel[e] + bias[e] for the bounds of each expert e; 0 past the last."""
    rows = inputs if token_of is None else inputs.index_select(0, token_of)
    kernels, biases = kernel.unbind(), None if bias is None else bias.unbind()
    parts = [rows.new_zeros(0, kernel.shape[-1])]
    for expert, start, end in _busy(bounds):
        sums = rows[start:end] @ kernels[expert].to(rows.dtype)
        parts.append(sums if biases is None else sums + biases[expert].to(rows.dtype))
    used = bounds[-1][1]
    return torch.cat([*parts, rows.new_zeros(rows.shape[0] - used, kernel.shape[-1])])


def _plain_sums(rows: Tensor, slot_of: Tensor, weights: Tensor) -> Tensor:
    """The sum over each token's slots `(k, N)` of rows `(S, width)`, `weights (N, k)` times."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    chosen = rows[slot_of].to(wide) * weights.t().unsqueeze(-1).to(wide)
    return chosen.sum(0).to(rows.dtype)


def _pairs(weights: Sequence[Tensor], count: int) -> list[tuple[Tensor, Tensor | None]]:
    """`count` kernels, each with its bias or without."""
    kernels, biases = weights[:count], weights[count:]
    return list(zip(kernels, biases or [None] * count, strict=True))


def _gradients(
    function: Callable[..., Any], inputs: Sequence[Tensor | None], upstream: Any
) -> list[Tensor | None]:
    """The gradients of a plain function, which can be differentiated; None where none is needed."""
    is_needed = [each is not None and each.requires_grad for each in inputs]
    wanted = [each for each, needed in zip(inputs, is_needed, strict=True) if needed]
    grads = iter(
        torch.autograd.grad(
            function(*inputs), wanted, upstream, create_graph=True, materialize_grads=True
        )
    )
    return [next(grads) if needed else None for needed in is_needed]


def with_gradient(
    function: Callable[..., Tensor],
    gradient: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    fixed: tuple[Tensor, ...],
) -> Tensor:
    """function(*inputs, *fixed) with the gradient gradient(upstream, *inputs, *fixed)."""
    if _is_transformed():  # by which Keras's custom gradients cannot be
        return function(*inputs, *fixed)
    return portable.with_gradient(function, gradient, inputs, fixed)


def _is_transformed() -> bool:
    """Whether a transform of `torch.func`, or forward-mode differentiation, is under way."""
    return (
        torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
    )


def _sorted_out(
    more: Sequence[Tensor], count: int
) -> tuple[Sequence[Tensor], Sequence[Tensor], Sequence[Tensor]]:
    """Tells the arguments of `_GroupedLinear` apart: slots are of integers."""
    slots = [each for each in more[:2] if not each.is_floating_point()]
    weights = more[len(slots) :]
    return slots, weights[:count], weights[count:]


def _rows(inputs: Tensor, slots: Sequence[Tensor], start: int, end: int) -> Tensor:
    return inputs.index_select(0, slots[0][start:end]) if slots else inputs[start:end]


def _linear(rows: Tensor, kernel: Tensor, bias: Tensor | None, out: Tensor) -> None:
    kernel = kernel.to(rows.dtype)
    if bias is None:
        torch.mm(rows, kernel, out=out)
    else:
        torch.addmm(bias.to(rows.dtype), rows, kernel, out=out)


def _mm(left: Tensor, right: Tensor, out: Tensor) -> None:
    """left @ right into `out`, which may have another dtype."""
    if out.dtype == left.dtype:
        torch.mm(left, right, out=out)
    else:
        out.copy_(left @ right)


def _by_slot(weights: Tensor, assignment: Tensor) -> Tensor:
    """The weight of the assignment in each slot, `(S, 1)`; of an empty slot, some."""
    return weights.t().reshape(-1)[assignment.clamp(max=weights.numel() - 1)][:, None]


def _sums(rows: Tensor, slot_of: Tensor, weights: Tensor | None = None) -> Tensor:
    """The sum over each token's slots `(k, N)` of rows `(S, width)`, `weights (N, k)` times."""
    if rows.dtype in (torch.float32, torch.float64):
        # One pass that gathers, multiplies and adds.
        return torch.nn.functional.embedding_bag(
            slot_of.t().contiguous(),
            rows,
            mode="sum",
            per_sample_weights=None if weights is None else weights.to(rows.dtype),
        )
    sums = rows.new_zeros(slot_of.shape[1], rows.shape[1], dtype=torch.float32)
    for choice, slots in enumerate(slot_of):
        chosen = rows.index_select(0, slots).float()
        sums += chosen if weights is None else chosen * weights[:, choice, None]
    return sums.to(rows.dtype)


def _bounds(ends: Tensor) -> Bounds:
    """Where each expert's rows begin and end, on the host."""
    if torch._C._functorch.is_batchedtensor(ends):
        raise ValueError(
            "`torch.func.vmap` cannot map over a layer whose experts each take their own rows. "
            "Use `dispatch='dense'`. Received: dispatch='walk'"
        )
    return list(itertools.pairwise([0, *ends.tolist()]))


def _busy(bounds: Bounds) -> Iterator[tuple[int, int, int]]:
    """The experts that have rows, and where those begin and end."""
    for expert, (start, end) in enumerate(bounds):
        if start < end:
            yield expert, start, end


def _zeros_where_idle(weights: Tensor, bounds: Bounds) -> Tensor:
    """Room for the gradient of a bank's weights, 0 for the experts that have no rows."""
    gradient = torch.empty_like(weights)
    for expert, (start, end) in enumerate(bounds):
        if start == end:
            gradient[expert] = 0
    return gradient


def _empty_with_zero_tail(like: Tensor, total: int, width: int, bounds: Bounds) -> Tensor:
    rows = like.new_empty(total, width)
    rows[bounds[-1][1] :] = 0
    return rows


def _with_zero_tail(rows: Tensor, bounds: Bounds) -> Tensor:
    spare = rows.shape[0] - bounds[-1][1]
    return torch.nn.functional.pad(rows[: bounds[-1][1]], (0, 0, 0, spare)) if spare else rows


def is_traced_for_export() -> bool:
    """Whether `torch.export` or `torch.jit.trace` traces the call, as its exporters do."""
    return bool(torch.compiler.is_exporting() or torch.jit.is_tracing())


def sort_for_export(bin_of: Tensor, num_bins: int) -> tuple[Tensor, Tensor]:
    """`sort_into_bins`, as order and edges, of operations that ONNX and OpenVINO take.

    They take no stable sort, so the keys are made distinct, and no binary search.
    """
    total = bin_of.shape[0]
    places = torch.arange(total, device=bin_of.device)
    order = torch.sort(bin_of.long() * total + places)[1]
    counts = torch.zeros(num_bins + 1, dtype=torch.int64, device=bin_of.device)
    counts = counts.scatter_add(0, bin_of.long(), torch.ones_like(places))
    return order.int(), (torch.cumsum(counts, 0) - counts).int()


def inverse_permutation(order: Tensor) -> Tensor:
    """Where each entry stands; `keras.ops.scatter` is a Python loop over entries on PyTorch."""
    places = torch.arange(order.shape[0], dtype=order.dtype, device=order.device)
    return torch.empty_like(order).scatter_(0, order.long(), places)


def grouped_matmul(rows: Tensor, kernel: Tensor, ends: Tensor) -> Tensor:
    """PyTorch's own grouped matmul; our loop where it wants rows of whole 16 bytes."""
    widths = (kernel.shape[1], kernel.shape[2])
    if any(width * rows.element_size() % 16 for width in widths):
        return _GroupedLinear.apply(rows, _bounds(ends), 1, kernel)[0]
    return torch.nn.functional.grouped_mm(rows, kernel, offs=ends)


def without_autocast() -> ExitStack[Any]:
    """A context in which `torch.autocast` leaves float32 as it is: it casts inputs of products.

    A router in bfloat16 sends 1 to 5 % of the tokens to other experts.
    """
    stack = ExitStack()
    for device in _AUTOCASTS:
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def is_recomputing() -> bool:
    """Whether `torch.utils.checkpoint` repeats a call, inside of a backward pass.

    What a call counts or adapts belongs to its first run. What it computes must stay the same: a
    checkpoint compares the tensors that both runs save.
    """
    return bool(torch._C._current_graph_task_id() != -1)


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether what is computed from a tensor, traced or not, is computed on a CPU."""
    return bool(tensor.device.type == "cpu")


def may_have_grouped_matmul(is_known: bool) -> bool:
    """Whether this kind of device has a `grouped_matmul` that beats a walk.

    On a CPU it is a loop over experts, which `walk` does without a pass for the biases.
    """
    return torch.cuda.is_available() and hasattr(torch.nn.functional, "grouped_mm")


def eagerly(function: Callable[[], Any]) -> Any:
    """Runs a function now, and waits for it."""
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result


def value_and_gradients(function: Callable[..., Tensor], *arguments: Tensor) -> tuple[Any, Any]:
    """The value of a function, and the gradients of the sum of its squares."""
    with torch.enable_grad():
        leaves = [argument.detach().requires_grad_() for argument in arguments]
        value = function(*leaves)
        return value.detach(), torch.autograd.grad((value**2).sum(), leaves)


def segment_sum(values: Tensor, segments: Tensor, num_segments: int) -> Tensor:
    """The sums of entries `(n, ...)` by the segment `(n,)` that each belongs to.

    Keras's (3.15.1) waits for the device: it repeats entries by numbers that are on it.
    """
    sums = values.new_zeros((num_segments, *values.shape[1:]))
    return sums.index_add(0, segments, values)


def sum_over_replicas(values: Sequence[Tensor]) -> Sequence[Tensor]:
    """The sums of float32 values over the ranks of `torch.distributed`, without gradient."""
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return values
    if distributed.get_world_size() == 1:
        return values
    flat = torch.cat([value.detach().reshape(-1) for value in values])
    distributed.all_reduce(flat)
    parts = flat.split([value.numel() for value in values])
    return [part.reshape(value.shape) for part, value in zip(parts, values, strict=True)]
