"""The mean over the places that are not padding."""

import keras
from keras import ops

from keras_moe.core.types import Shape, Tensor


def masked_mean(x: Tensor, mask: Tensor, dtype: str) -> Tensor:
    """Averages x `(batch, n, d)` over n where the mask `(batch, n)` is True; 0 if it never is.

    `keras.layers.GlobalAveragePooling1D` divides by 0 there.
    """
    # In float32 at least: bfloat16 cannot add up a long sequence.
    wide = keras.backend.result_type(dtype, "float32")
    mask = ops.cast(mask, "bool")
    kept = ops.where(mask[..., None], ops.cast(x, wide), 0.0)
    count = ops.sum(ops.cast(mask, wide), axis=1)
    return ops.cast(ops.sum(kept, axis=1) / ops.maximum(count, 1.0)[:, None], dtype)


@keras.saving.register_keras_serializable(package="keras_moe")
class MaskedMean(keras.layers.Layer):
    """Averages `(batch, n, d)` over n, of which masked places are left out."""

    def call(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return ops.mean(inputs, axis=1)
        return masked_mean(inputs, mask, self.compute_dtype)

    def compute_mask(self, inputs: Tensor, previous_mask: Tensor | None) -> None:
        """Leaves no mask: the axis is gone."""

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        batch, _, width = input_shape
        return (batch, width)
