"""The mean of a history's vectors, without its padding."""

from collections.abc import Sequence
from typing import TypeAlias

import keras
from keras import ops

from keras_moe.core import checks
from keras_moe.core.types import Shape, Tensor
from keras_moe.models._masked_mean import masked_mean

Masks: TypeAlias = Sequence[Tensor | None] | None


@keras.saving.register_keras_serializable(package="keras_moe")
class HistoryMean(keras.layers.Layer):
    """Averages vectors over the places whose id is not 0; a history without any gives zeros.

    y[b,:] = sum_n [ids[b,n] != 0] x[b,n,:] / max(1, sum_n [ids[b,n] != 0])

    Places that a mask leaves out count for nothing either. `GlobalAveragePooling1D` with a mask
    divides by 0 for a history without any.

    Call arguments:
        inputs: The vectors `(batch, n, d)` and the ids `(batch, n)`, in a list.
        mask: A mask `(batch, n)` or None for each of them, in a list. Defaults to `None`, which
            takes those that Keras passes on.

    Input shape:
        `[(batch, n, d), (batch, n)]`

    Output shape:
        `(batch, d)`

    Raises:
        ValueError: on inputs of other ranks.

    Example:

    >>> import numpy as np
    >>> from keras_moe.models import HistoryMean
    >>> vectors = np.array([[[2.0], [4.0], [9.0]], [[1.0], [1.0], [1.0]]], "float32")
    >>> ids = np.array([[7, 5, 0], [0, 0, 0]])
    >>> HistoryMean()([vectors, ids]).shape == (2, 1)
    True
    """

    def build(self, input_shape: Sequence[Shape]) -> None:
        vectors, ids = (tuple(shape) for shape in input_shape)
        if len(vectors) != 3 or len(ids) != 2:
            checks.fail("`HistoryMean` expects [(batch, n, d), (batch, n)].", shapes=input_shape)

    def call(self, inputs: Sequence[Tensor], mask: Masks = None) -> Tensor:
        vectors, ids = inputs
        known = ops.not_equal(ids, 0)
        for input_mask in mask or ():
            if input_mask is not None:
                known = ops.logical_and(known, ops.cast(input_mask, "bool"))
        return masked_mean(vectors, known, self.compute_dtype)

    def compute_mask(self, inputs: Sequence[Tensor], previous_mask: Masks) -> None:
        """Leaves no mask: the axis is gone."""

    def compute_output_shape(self, input_shape: Sequence[Shape]) -> Shape:
        vectors = tuple(input_shape[0])
        return (vectors[0], vectors[-1])
