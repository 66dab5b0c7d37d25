"""Aliases that say what a signature means; Keras itself has no static types to lean on."""

from collections.abc import Callable
from typing import Any, TypeAlias

Tensor: TypeAlias = Any
"""A tensor of the active backend, or a `keras.KerasTensor` while a functional model is built."""

Shape: TypeAlias = tuple[int | None, ...]
Config: TypeAlias = dict[str, Any]
Activation: TypeAlias = str | Callable[[Any], Any] | None
InitializerLike: TypeAlias = Any
RegularizerLike: TypeAlias = Any
ConstraintLike: TypeAlias = Any
