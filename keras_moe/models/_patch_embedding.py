"""Patches of images as vectors."""

import keras
from keras import ops

from keras_moe.core import checks
from keras_moe.core.types import Shape, Tensor


@keras.saving.register_keras_serializable(package="keras_moe")
class PatchEmbedding(keras.layers.Conv2D):
    """Maps images to the vectors of their patches, row by row.

    `(batch, height, width, channels) -> (batch, patches, d)`

    A mask `(batch, height, width)` says which pixels are image. Others count as 0, whatever they
    hold, and a patch without a pixel of the image is padding: it is masked for later layers.

    The arguments are those of `keras.layers.Conv2D`, strides equal to the size of the kernel.
    """

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is not None:
            is_image = self._checked_mask(inputs, mask)
            inputs = ops.where(is_image[..., None], inputs, ops.zeros_like(inputs))
        patches = super().call(inputs)
        return ops.reshape(patches, (-1, self._count(inputs.shape), self.filters))

    def compute_mask(self, inputs: Tensor, previous_mask: Tensor | None) -> Tensor | None:
        if previous_mask is None:
            return None
        _, height, width, _ = inputs.shape
        side = self.kernel_size[0]
        pixels = ops.reshape(
            self._checked_mask(inputs, previous_mask),
            (-1, height // side, side, width // side, side),
        )
        return ops.reshape(ops.any(pixels, axis=(2, 4)), (-1, self._count(inputs.shape)))

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        return (input_shape[0], self._count(input_shape), self.filters)

    def _count(self, input_shape: Shape) -> int:
        _, height, width, _ = input_shape
        return int(height // self.kernel_size[0]) * int(width // self.kernel_size[1])

    def _checked_mask(self, inputs: Tensor, mask: Tensor) -> Tensor:
        mask = ops.convert_to_tensor(mask)
        checks.mask_shape(self.name, inputs, mask)
        return ops.cast(mask, "bool")
