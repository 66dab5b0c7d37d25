"""FLOPs of each product that `keras.ops` offers, from shapes; multiply and add count as two."""

import math
from collections.abc import Callable
from typing import Any

from keras_moe.core.types import Tensor

# A rule gets the output's shape and the operation's arguments.
Formula = Callable[..., int]


def _size(tensor: Tensor) -> int:
    return math.prod(tensor.shape)


def _matmul(output: Tensor, x1: Tensor, x2: Tensor) -> int:
    return 2 * _size(output) * x1.shape[-1]


def _tensordot(output: Tensor, x1: Tensor, x2: Tensor, **_: Any) -> int:
    """(a k) by (k b) is (a b): the square root of a k * k b * a b is the a k b products."""
    if not x1.shape or not x2.shape:
        return 0  # a number times a tensor is elementwise
    return 2 * math.isqrt(_size(x1) * _size(x2) * _size(output))


def _einsum(output: Tensor, subscripts: str, *operands: Tensor, **_: Any) -> int:
    """Operands are contracted from left to right, an axis as soon as nothing later names it."""
    names, is_explicit, kept = subscripts.replace(" ", "").partition("->")
    terms = [_axes(t, len(x.shape)) for t, x in zip(names.split(","), operands, strict=True)]
    every = [axis for term in terms for axis in term]
    if is_explicit:
        last = set(_axes(kept, len(output.shape)))
    else:
        last = {axis for axis in every if every.count(axis) == 1 or len(axis) > 1}
    sizes: dict[str, int] = {}
    for term, operand in zip(terms, operands, strict=True):
        for axis, size in zip(term, operand.shape, strict=True):
            sizes[axis] = max(size, sizes.get(axis, 1))  # an axis of 1 may be broadcast

    flops, joined = 0, set(terms[0])
    for index, term in enumerate(terms[1:], start=2):
        joined |= set(term)
        needed = last.union(*terms[index:])
        if joined - needed:  # else elementwise
            flops += 2 * math.prod(sizes[axis] for axis in joined)
        joined &= needed
    return flops


def _axes(term: str, rank: int) -> list[str]:
    """Names each axis; those of an ellipsis count from the right, as they are broadcast."""
    before, ellipsis, after = term.partition("...")
    free = rank - len(before) - len(after) if ellipsis else 0
    return [*before, *(f"...{free - i}" for i in range(free)), *after]


def _conv(output: Tensor, inputs: Tensor, kernel: Tensor, *_: Any, **__: Any) -> int:
    """`kernel (..., in / groups, out)`; what falls into the padding counts too."""
    return 2 * _size(output) * math.prod(kernel.shape[:-1])


def _conv_transpose(output: Tensor, inputs: Tensor, kernel: Tensor, *_: Any, **__: Any) -> int:
    """`kernel (..., out, in)`: each input value is spread over a window of every output channel."""
    return 2 * _size(inputs) * math.prod(kernel.shape[:-1])


def _depthwise_conv(output: Tensor, inputs: Tensor, kernel: Tensor, *_: Any, **__: Any) -> int:
    """`kernel (..., in, multiplier)`: an output value sees the window of one input channel."""
    return 2 * _size(output) * math.prod(kernel.shape[:-2])


def _separable_conv(
    output: Tensor,
    inputs: Tensor,
    depthwise_kernel: Tensor,
    pointwise_kernel: Tensor,
    *_: Any,
    **__: Any,
) -> int:
    *_ones, between, channels = pointwise_kernel.shape
    places = _size(output) // channels
    return 2 * places * between * (math.prod(depthwise_kernel.shape[:-2]) + channels)


def _attention(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    """Scores and the mix of values, `(b, t, heads, d)` against `(b, s, ...)`, masked or not."""
    scores = math.prod(query.shape[:-1]) * key.shape[1]
    return 2 * scores * (query.shape[-1] + value.shape[-1])


FORMULAS: dict[str, dict[str, Formula]] = {
    "numpy": {
        "matmul": _matmul,
        "einsum": _einsum,
        "dot": _tensordot,
        "inner": _tensordot,
        "tensordot": _tensordot,
        "vdot": _tensordot,
    },
    "nn": {
        "conv": _conv,
        "conv_transpose": _conv_transpose,
        "depthwise_conv": _depthwise_conv,
        "separable_conv": _separable_conv,
        "dot_product_attention": _attention,
    },
}
"""Formulas by module and name of the function of Keras's backend that all callers go through."""
