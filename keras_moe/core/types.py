"""Aliases that say what a signature means; Keras itself has no static types to lean on."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

Tensor: TypeAlias = Any
"""A tensor of the active backend, or a `keras.KerasTensor` while a functional model is built."""

Size: TypeAlias = int | Tensor
"""The size of an axis: an int, or what stands for an unknown one, see `keras_moe.core.sizes`."""

Axes: TypeAlias = tuple[Size, ...]
"""The sizes of several axes of a tensor, as `ops.shape` gives them."""

Array: TypeAlias = np.ndarray[Any, Any]
Data: TypeAlias = Any
"""A tensor or an array, or a dict, list or tuple of them, as a model takes."""

Shape: TypeAlias = tuple[int | None, ...]
Config: TypeAlias = dict[str, Any]
Logs: TypeAlias = dict[str, float]
"""What Keras hands to a callback: metrics by name."""
Activation: TypeAlias = str | Callable[[Any], Any] | None
InitializerLike: TypeAlias = Any
RegularizerLike: TypeAlias = Any
ConstraintLike: TypeAlias = Any

ExpertsLike: TypeAlias = Any
"""A name, a bank, a Keras layer, the config of one of these, or a list of Keras layers."""
