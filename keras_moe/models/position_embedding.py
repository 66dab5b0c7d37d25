"""Learned positions."""

from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.types import Config, InitializerLike, Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_moe")
class PositionEmbedding(keras.layers.Layer):
    """Adds a learned vector to each place of a sequence.

    y[b,n,:] = x[b,n,:] + positions[n,:]

    Args:
        initializer: Initializer of the positions; None for a normal of standard deviation 0.02
            (Dosovitskiy et al.'s code). Defaults to `None`.
        max_length: Positive integer, the places there are vectors for, of which shorter sequences
            use the first; None for as many as the inputs have, whose length is then fixed. Defaults
            to `None`.

    Call arguments:
        inputs: `(batch, n, d)`.

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
        self, initializer: InitializerLike = None, max_length: int | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.max_length = _checks.optional(_checks.positive_int, "max_length", max_length)
        if initializer is None:
            initializer = keras.initializers.RandomNormal(stddev=0.02)
        self.initializer = keras.initializers.get(initializer)
        self.supports_masking = True

    def build(self, input_shape: Shape) -> None:
        shape = tuple(input_shape)
        length = self.max_length or (shape[1] if len(shape) == 3 else None)
        if len(shape) != 3 or length is None or shape[2] is None:
            _checks.fail("`PositionEmbedding` expects inputs (batch, n, d), n known.", shape=shape)
        self.positions = self.add_weight(
            name="positions", shape=(length, shape[2]), initializer=self.initializer
        )

    def call(self, inputs: Tensor) -> Tensor:
        if self.max_length is None:
            return inputs + self.positions
        length = inputs.shape[1]
        if length is not None and length > self.max_length:
            _checks.fail(f"Inputs must have at most max_length={self.max_length} places.", n=length)
        return inputs + self.positions[: ops.shape(inputs)[1]]

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "initializer": keras.initializers.serialize(self.initializer),
            "max_length": self.max_length,
        }
