"""Dropless dispatch on PyTorch: gather, per layer one matmul for each expert, combine.

Eager PyTorch has no static shapes to keep: each expert multiplies exactly its own rows, and nothing
is padded. The loop has a backward pass of its own, since autograd would make a gradient as large as
the whole bank for each expert that is indexed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from keras_moe.dispatch.plan import Slots
from keras_moe.dispatch.stages import Stage
from keras_moe.types import Tensor


def row_padding(total: int, num_experts: int) -> int:
    """Rows that must follow the last one: none."""
    del total, num_experts
    return 0


@torch.compiler.disable  # the loop's bounds are data; `torch.compile` goes on after it
def carry(
    tokens: Tensor, weights: Tensor, slots: Slots, ends: Tensor, stages: Sequence[Stage]
) -> Tensor:
    """Applies each token's experts and sums what they give, weighted.

    Args:
        tokens: `(N, d)`.
        weights: `(N, k)`, the weight of each assignment.
        slots: assignments sorted by expert, those without an expert last.
        ends: int32 `(E,)`, where each expert's slots end; the first one's begin at 0.
        stages: the layers of the experts.

    Returns:
        `(N, out)`, summed in float32 at least.
    """
    count, top_k = weights.shape
    if count == 0:
        return tokens.new_zeros(0, stages[-1].kernels[0].shape[-1])
    # An assignment without an expert finds its zero in the last slot, which then has none either.
    slot_of = slots.slot_of.clamp(max=count * top_k - 1).view(top_k, count)
    token_of = slots.assignment % count
    rows = _Gather.apply(tokens, token_of, slot_of)
    bounds = _bounds(ends)
    for stage in stages:
        biases = stage.biases or [None] * len(stage.kernels)
        sums = [
            _GroupedLinear.apply(rows, kernel, bias, bounds)
            for kernel, bias in zip(stage.kernels, biases, strict=True)
        ]
        rows = sums[0] if stage.activation is None else stage.activation(*sums)
        if stage.scale is not None:
            rows = rows * stage.scale
    if stages[-1].activation is not None:  # which need not be 0 at 0
        rows = _with_zero_tail(rows, bounds)
    return _Combine.apply(rows, weights, slots.assignment, token_of, slot_of, bounds[-1][1])


class _Gather(torch.autograd.Function):
    """The token of each slot; its gradient is a gather too, of each token's slots."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, token_of: Tensor, slot_of: Tensor) -> Tensor:
        ctx.save_for_backward(slot_of)
        return tokens.index_select(0, token_of)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        (slot_of,) = ctx.saved_tensors
        return _sums(upstream.contiguous(), slot_of), None, None


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
        wide = torch.promote_types(outputs.dtype, torch.float32)
        by_slot = upstream.index_select(0, token_of)
        slope = torch.linalg.vecdot(outputs.to(wide), by_slot.to(wide))
        slope[ctx.used :] = 0  # nobody's slots, whatever the token that fills them has
        weight_of = weights.t().reshape(-1)[assignment.clamp(max=slot_of.numel() - 1)]
        by_outputs = by_slot.mul_(weight_of[:, None])
        return by_outputs, slope[slot_of].t().to(weights.dtype), None, None, None, None


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


class _GroupedLinear(torch.autograd.Function):
    """rows[start:end] @ kernel[e] + bias[e] for the bounds of each expert e; 0 past the last."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, kernel: Tensor, bias: Tensor | None, bounds: list[tuple[int, int]]
    ) -> Tensor:
        ctx.save_for_backward(rows, kernel)
        ctx.bounds, ctx.has_bias = bounds, bias is not None
        outputs = _empty_with_zero_tail(rows, kernel.shape[-1], bounds)
        for expert, (start, end) in enumerate(bounds):
            if start == end:
                continue
            part = outputs[start:end]
            if bias is None:
                torch.mm(rows[start:end], kernel[expert], out=part)
            else:
                torch.addmm(bias[expert], rows[start:end], kernel[expert], out=part)
        return outputs

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        rows, kernel = ctx.saved_tensors
        needs_rows, needs_kernel, needs_bias, _ = ctx.needs_input_grad
        upstream = upstream.contiguous()
        by_rows = _empty_with_zero_tail(rows, rows.shape[-1], ctx.bounds) if needs_rows else None
        by_kernel = torch.empty_like(kernel) if needs_kernel else None
        by_bias = kernel.new_empty(kernel.shape[0], kernel.shape[-1]) if needs_bias else None
        for expert, (start, end) in enumerate(ctx.bounds):
            part = upstream[start:end]
            if by_rows is not None:
                torch.mm(part, kernel[expert].T, out=by_rows[start:end])
            if by_kernel is not None:
                torch.mm(rows[start:end].T, part, out=by_kernel[expert])
            if by_bias is not None:
                torch.sum(part, dim=0, out=by_bias[expert])
        return by_rows, by_kernel, by_bias, None


def _bounds(ends: Tensor) -> list[tuple[int, int]]:
    """Where each expert's rows begin and end, on the host."""
    return list(itertools.pairwise([0, *ends.tolist()]))


def _empty_with_zero_tail(rows: Tensor, width: int, bounds: list[tuple[int, int]]) -> Tensor:
    outputs = rows.new_empty(rows.shape[0], width)
    outputs[bounds[-1][1] :] = 0
    return outputs


def _with_zero_tail(rows: Tensor, bounds: list[tuple[int, int]]) -> Tensor:
    spare = rows.shape[0] - bounds[-1][1]
    return torch.nn.functional.pad(rows[: bounds[-1][1]], (0, 0, 0, spare)) if spare else rows


def inverse_permutation(order: Tensor) -> Tensor:
    """Where each entry stands; `keras.ops.scatter` is a Python loop over entries on PyTorch."""
    places = torch.arange(order.shape[0], dtype=order.dtype, device=order.device)
    return torch.empty_like(order).scatter_(0, order.long(), places)


def grouped_matmul(rows: Tensor, kernel: Tensor, ends: Tensor) -> Tensor:
    """PyTorch's own grouped matmul; our loop where it wants rows of whole 16 bytes."""
    widths = (kernel.shape[1], kernel.shape[2])
    if any(width * rows.element_size() % 16 for width in widths):
        return _GroupedLinear.apply(rows, kernel, None, _bounds(ends))
    return torch.nn.functional.grouped_mm(rows, kernel, offs=ends)


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether what is computed from a tensor, traced or not, is computed on a CPU."""
    return bool(tensor.device.type == "cpu")


def may_have_grouped_matmul() -> bool:
    """Whether a probe of `grouped_matmul` is worth its time on this device.

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
