"""Random shifts and mirrors, inside of the training step."""

from __future__ import annotations

import keras
from keras import ops, random


class RandomShiftAndFlip(keras.layers.Layer):
    """Moves each image by whole pixels, and mirrors half of them, in training only.

    Keras's `RandomTranslation` and `RandomFlip` do more, but declare `supports_jit = False`, which
    makes `fit` run the whole model without a compiler: on JAX a hundred times slower.

    Args:
        shift: Pixels, at most, in each direction; the border is repeated. Defaults to `0`.
        flip: Whether to mirror. Defaults to `False`.
    """

    def __init__(self, shift: int = 0, flip: bool = False, **kwargs):
        super().__init__(**kwargs)
        self.shift, self.flip = shift, flip
        self.seed_generator = random.SeedGenerator()

    def call(self, images, training=False):
        if not training:
            return images
        batch, height, width, _ = ops.shape(images)
        # A matrix per image and axis, with one 1 a row: products compile better than gathers.
        down = self._picks(batch, height)
        right = self._picks(batch, width)
        if self.flip:
            mirror = random.randint((batch, 1, 1), 0, 2, seed=self.seed_generator)
            right = ops.where(mirror == 1, ops.flip(right, axis=1), right)
        return ops.einsum("bij,bjkc,blk->bilc", down, images, right)

    def _picks(self, batch, length: int):
        shift = random.randint(
            (batch, 1), -self.shift, self.shift + 1, seed=self.seed_generator, dtype="int32"
        )
        source = ops.clip(ops.arange(length) + shift, 0, length - 1)
        return ops.one_hot(source, length, dtype=self.compute_dtype)

    def compute_output_spec(self, images, training=False):
        return keras.KerasTensor(images.shape, dtype=self.compute_dtype)
