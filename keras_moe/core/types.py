"""Aliases that say what a signature means; Keras itself has no static types to lean on."""

from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

Tensor: TypeAlias = Any
"""A tensor of the active backend, or a `keras.KerasTensor` while a functional model is built."""

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
