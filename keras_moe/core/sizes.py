"""Sizes of axes: integers, or tensors and symbols for unknown ones.

In a TensorFlow graph that is a scalar tensor. While JAX or PyTorch traces a model for export, and
while Keras infers a shape on JAX, it is a symbol, which knows integer arithmetic and no more.
"""

from keras import ops

from keras_moe.core.types import Size, Tensor


def is_symbolic(size: Size) -> bool:
    """Whether a size is a symbol, neither an int nor a tensor that holds one."""
    return not isinstance(size, int) and not hasattr(size, "dtype")


def as_tensor(size: Size, dtype: str) -> Tensor:
    """The size as a scalar tensor."""
    if is_symbolic(size):  # PyTorch would make a constant of it
        return ops.sum(ops.ones((size,), dtype=dtype))
    return ops.cast(size, dtype)


def at_least(size: Size, least: int) -> Size:
    """The larger one of a size and a number. A symbol counts as large enough."""
    if isinstance(size, int):
        return max(size, least)
    return size if is_symbolic(size) else ops.maximum(size, least)


def at_most(size: Size, most: int) -> Size:
    """The smaller one of a size and a number. A symbol counts as large enough."""
    if isinstance(size, int):
        return min(size, most)
    return most if is_symbolic(size) else ops.minimum(size, most)
