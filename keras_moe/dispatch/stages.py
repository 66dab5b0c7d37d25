"""What a carrier may know of a bank of multilayer perceptrons: its weights, layer by layer."""

from collections.abc import Callable
from typing import NamedTuple

from keras_moe.types import Tensor


class Stage(NamedTuple):
    """One layer of every expert: rows -> activation(rows @ kernel + bias, ...) * scale.

    Attributes:
        kernels: `(E, in, out)` each: one, or two where the activation takes two (gate and value).
        biases: `(E, out)` for each kernel, or an empty tuple.
        activation: elementwise, of as many `(rows, out)` as there are kernels; None for linear.
        scale: dropout's factors `(S, out)`, one for each row, or None.
    """

    kernels: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    activation: Callable[..., Tensor] | None
    scale: Tensor | None = None
