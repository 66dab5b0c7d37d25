"""Grouped feed-forward layers on PyTorch: per layer, one matmul for each expert.

Eager PyTorch has no static shapes to keep: each expert multiplies exactly its own rows, and nothing
is padded. The loop has a backward pass of its own, since autograd would make a gradient as large as
the whole bank for each expert that is indexed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch

from keras_moe.dispatch.stages import Stage
from keras_moe.types import Tensor


def row_padding(total: int, num_experts: int) -> int:
    """Rows that must follow the last one: none."""
    del total, num_experts
    return 0


@torch.compiler.disable  # the loop's bounds are data; `torch.compile` goes on after it
def walk(rows: Tensor, ends: Tensor, stages: Sequence[Stage], total: int) -> Tensor:
    """Applies each expert to its own rows.

    Args:
        rows: `(total, d)`, sorted by expert.
        ends: int32 `(E,)`, where each expert's rows end; the first one's begin at 0.
        stages: the layers of the experts.
        total: the rows.

    Returns:
        `(total, out)`; past `ends[-1]` it is 0.
    """
    del total
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
    return rows


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
