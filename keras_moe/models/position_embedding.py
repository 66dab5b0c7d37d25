"""Learned positions."""

from typing import Any

import keras
from keras import ops

from keras_moe.core import checks
from keras_moe.core.arguments import KeepsArguments
from keras_moe.core.types import Config, InitializerLike, Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_moe")
class PositionEmbedding(KeepsArguments):
    """Adds a learned vector at each position of a sequence.

    y[b,n,:] = x[b,n,:] + positions[max(n - start[b], 0),:]

    start[b] is 0 without a mask. With one it is the first place that is not masked, so that a
    sequence has the positions that it would have without padding on its left; padding on its right,
    and holes, move nothing.

    Args:
        initializer: Initializer of the positions; None for a normal of standard deviation 0.02
            (Dosovitskiy et al.'s code). Defaults to `None`.
        max_length: Positive integer, the places there are vectors for, of which shorter sequences
            use the first; None for as many as the inputs have, whose length is then fixed. Defaults
            to `None`.
        counts_padding: Whether start[b] is 0 with a mask too, as where places are those of a grid.
            Defaults to `False`.

    Call arguments:
        inputs: `(batch, n, d)`.
        mask: Optional bool `(batch, n)`, False at padding. Defaults to `None`, which takes that of
            the inputs.

    Input shape:
        `(batch, n, d)`, d known, n at most `max_length`, or known where that is None.

    Output shape:
        `(batch, n, d)`

    Raises:
        ValueError: on inputs of another rank, of more than `max_length` places, or of unknown
            length without a `max_length`.

    Example:

    >>> import numpy as np
    >>> from keras_moe.models import PositionEmbedding
    >>> tuple(PositionEmbedding()(np.zeros((2, 16, 8), "float32")).shape)
    (2, 16, 8)

    Reference:
        Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words", section 3.1, equation 1.
    """

    def __init__(
        self,
        initializer: InitializerLike = None,
        max_length: int | None = None,
        counts_padding: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.max_length = checks.optional(checks.positive_int, "max_length", max_length)
        if initializer is None:
            initializer = keras.initializers.RandomNormal(stddev=0.02)
        self.initializer = keras.initializers.get(initializer)
        self.counts_padding = counts_padding
        self.supports_masking = True

    def build(self, input_shape: Shape) -> None:
        shape = tuple(input_shape)
        length = self.max_length or (shape[1] if len(shape) == 3 else None)
        if len(shape) != 3 or length is None or shape[2] is None:
            checks.fail("`PositionEmbedding` expects inputs (batch, n, d), n known.", shape=shape)
        self.positions = self.add_weight(
            name="positions",
            shape=(length, shape[2]),
            initializer=self.initializer,
            autocast=False,  # bfloat16 cannot add up the gradients of a large batch
        )

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        positions = self.positions
        if self.max_length is not None:
            length = inputs.shape[1]
            if length is not None and length > self.max_length:
                checks.fail(
                    f"Inputs must have at most max_length={self.max_length} places.", n=length
                )
            positions = positions[: ops.shape(inputs)[1]]
        if mask is not None and not self.counts_padding:
            positions = ops.take(positions, _places(mask), axis=0)
        return inputs + ops.cast(positions, self.compute_dtype)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "initializer": keras.initializers.serialize(self.initializer),
            "max_length": self.max_length,
            "counts_padding": self.counts_padding,
        }


def _places(mask: Tensor) -> Tensor:
    """Counts the places from the first that is True, and 0 before it, int32 `(batch, n)`."""
    tokens = ops.cumsum(ops.cast(ops.cast(mask, "bool"), "int32"), axis=1)
    return ops.maximum(ops.cumsum(ops.cast(tokens > 0, "int32"), axis=1) - 1, 0)
