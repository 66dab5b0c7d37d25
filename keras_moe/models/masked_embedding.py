"""Embeddings with a mask of the ids that are padding."""

from typing import Any

import keras
from keras import ops

from keras_moe.core import checks
from keras_moe.core.types import Config, Tensor


@keras.saving.register_keras_serializable(package="keras_moe")
class MaskedEmbedding(keras.layers.Embedding):
    """Embedding layer that passes the mask of its ids on, and can mask an id of your choice.

    y[b,n,:]  = embeddings[ids[b,n],:]
    mask[b,n] = ids[b,n] != padding_id, and True in the mask of the ids, if they have one

    Keras's own knows no padding but id 0, and drops the mask of its ids. Layers that are called
    with the vectors get the mask from Keras; the vectors of padding are as the table has them.

    Args:
        input_dim: Positive integer, the ids, 0 to input_dim - 1.
        output_dim: Positive integer, the width of the vectors.
        padding_id: Integer in [0, input_dim), the id that stands for padding; None where all ids
            are real. Defaults to `None`.
        **kwargs: The other arguments of `keras.layers.Embedding` but for `mask_zero`, which is
            `padding_id=0`.

    Call arguments:
        As of `keras.layers.Embedding`.

    Output shape:
        That of the ids with `output_dim` behind it.

    Raises:
        ValueError: on a `padding_id` that is no id, `mask_zero`, or a mask that has not the shape
            of the ids.

    Example:

    >>> import numpy as np
    >>> from keras_moe.models import MaskedEmbedding
    >>> layer = MaskedEmbedding(256, 8, padding_id=255)
    >>> layer.compute_mask(np.array([[255, 255, 7], [0, 7, 8]])).shape == (2, 3)
    True
    """

    def __init__(
        self, input_dim: int, output_dim: int, padding_id: int | None = None, **kwargs: Any
    ) -> None:
        if "mask_zero" in kwargs:
            checks.fail(
                "`padding_id` must say which id is padding, 0 in place of `mask_zero=True`.",
                mask_zero=kwargs["mask_zero"],
            )
        super().__init__(input_dim, output_dim, **kwargs)
        if padding_id is not None:
            checks.int_between("padding_id", padding_id, 0, input_dim - 1, "input_dim - 1")
            padding_id = int(padding_id)
        self.padding_id = padding_id
        self.supports_masking = True

    def compute_mask(self, inputs: Tensor, mask: Tensor | None = None) -> Tensor | None:
        if isinstance(inputs, keras.KerasTensor):
            # Keras would fix a symbolic mask as an argument of the layers that take one, and they
            # would not see the mask that a model is called with.
            return None
        if mask is not None:
            mask = ops.convert_to_tensor(mask)
            checks.mask_of_ids(self.name, inputs, mask)
            mask = ops.cast(mask, "bool")
        if self.padding_id is None:
            return mask
        is_token = ops.not_equal(inputs, self.padding_id)
        return is_token if mask is None else ops.logical_and(is_token, mask)

    def quantize(
        self, mode: str | None = None, type_check: bool = True, config: Any = None
    ) -> None:
        """Quantizes the table as Keras does; it refuses subclasses, which may compute otherwise."""
        super().quantize(
            mode, type_check=type_check and type(self) is not MaskedEmbedding, config=config
        )

    def get_config(self) -> Config:
        config = {**super().get_config(), "padding_id": self.padding_id}
        del config["mask_zero"]
        return config
