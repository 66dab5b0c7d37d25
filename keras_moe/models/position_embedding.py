"""Learned positions."""

from typing import Any

import keras

from keras_moe import _checks
from keras_moe.types import Config, InitializerLike, Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_moe")
class PositionEmbedding(keras.layers.Layer):
    """Adds a learned vector to each place of a sequence of fixed length.

    y[b,n,:] = x[b,n,:] + positions[n,:]

    Args:
        initializer: Initializer of the positions; None for a normal of standard deviation 0.02
            (Dosovitskiy et al.'s code). Defaults to `None`.

    Call arguments:
        inputs: `(batch, n, d)`.

    Input shape:
        `(batch, n, d)`, n and d known.

    Output shape:
        `(batch, n, d)`

    Raises:
        ValueError: on inputs of another rank, or of unknown length.

    Example:

    >>> import numpy as np
    >>> from keras_moe.models import PositionEmbedding
    >>> tuple(PositionEmbedding()(np.zeros((2, 16, 8), "float32")).shape)
    (2, 16, 8)

    Reference:
        Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words", section 3.1, equation 1.
    """

    def __init__(self, initializer: InitializerLike = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if initializer is None:
            initializer = keras.initializers.RandomNormal(stddev=0.02)
        self.initializer = keras.initializers.get(initializer)
        self.supports_masking = True

    def build(self, input_shape: Shape) -> None:
        shape = tuple(input_shape)
        if len(shape) != 3 or None in shape[1:]:
            _checks.fail("`PositionEmbedding` expects inputs (batch, n, d), n known.", shape=shape)
        self.positions = self.add_weight(
            name="positions", shape=shape[1:], initializer=self.initializer
        )

    def call(self, inputs: Tensor) -> Tensor:
        return inputs + self.positions

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return input_shape

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "initializer": keras.initializers.serialize(self.initializer),
        }
