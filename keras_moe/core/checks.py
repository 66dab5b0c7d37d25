"""Argument checks that say what is expected and what was received."""

import math
import re
from collections.abc import Callable, Collection
from typing import Any, NoReturn, TypeGuard, TypeVar

import keras
import numpy as np

from keras_moe.core.types import Shape, Tensor

T = TypeVar("T")


def fail(expectation: str, **received: object) -> NoReturn:
    """Raises a `ValueError` in Keras's form: what is expected, then what was received."""
    shown = ", ".join(f"{name}={value!r}" for name, value in received.items())
    raise ValueError(f"{expectation} Received: {shown}")


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def positive_int(name: str, value: object) -> int:
    """Returns `value` as an `int` of at least 1."""
    if not _is_integer(value) or value < 1:
        fail(f"`{name}` must be a positive integer.", **{name: value})
    return int(value)


def integer(name: str, value: object) -> int:
    """Returns `value` as an `int`."""
    if not _is_integer(value):
        fail(f"`{name}` must be an integer or None.", **{name: value})
    return int(value)


def int_at_least(name: str, value: object, low: int) -> int:
    """Returns `value` as an `int` of at least `low`."""
    if not _is_integer(value) or value < low:
        fail(f"`{name}` must be an integer of at least {low}.", **{name: value})
    return int(value)


def int_between(name: str, value: object, low: int, high: int, high_name: str) -> int:
    """Returns `value` as an `int` in [low, high]."""
    if not _is_integer(value) or not low <= value <= high:
        fail(f"`{name}` must be an integer between {low} and {high_name}={high}.", **{name: value})
    return int(value)


def non_negative(name: str, value: object) -> float:
    """Returns `value` as a finite `float` of at least 0."""
    number = _number(name, value, "a number of at least 0")
    if number < 0:
        fail(f"`{name}` must be a number of at least 0.", **{name: value})
    return number


def positive(name: str, value: object) -> float:
    """Returns `value` as a finite `float` above 0."""
    number = _number(name, value, "a number above 0")
    if number <= 0:
        fail(f"`{name}` must be a number above 0.", **{name: value})
    return number


def rate(name: str, value: object) -> float:
    """Returns `value` as a `float` in [0, 1)."""
    number = _number(name, value, "a number in [0, 1)")
    if not 0 <= number < 1:
        fail(f"`{name}` must be a number in [0, 1).", **{name: value})
    return number


def _number(name: str, value: Any, expected: str) -> float:
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value):
        fail(f"`{name}` must be {expected}.", **{name: value})
    return float(value)


def optional(check: Callable[[str, Any], T], name: str, value: object) -> T | None:
    """Returns None for None, and the checked value otherwise."""
    return None if value is None else check(name, value)


def one_of(name: str, value: object, known: Collection[str]) -> str:
    """Returns `value` if it is one of the known names."""
    if value not in known:
        fail(f"`{name}` must be one of {sorted(known)}.", **{name: value})
    return str(value)


def layer_name(name: str, value: object) -> str:
    """Returns `value` if every backend takes it for the name of a layer."""
    # TensorFlow's scopes take some of ASCII alone, PyTorch's modules no dot, and Keras no slash.
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9_-]+", value):
        fail(
            f"`{name}` must be a non-empty string of letters from a to z, digits, `_` and `-`.",
            **{name: value},
        )
    return value


def keras_layer(name: str, value: object) -> keras.layers.Layer:
    """Returns `value` if it is a layer or model of Keras 3."""
    if not isinstance(value, keras.layers.Layer):
        fail(f"`{name}` must be a Keras 3 model or layer.", **{f"type({name})": type(value)})
    return value


def built(name: str, value: object) -> keras.layers.Layer:
    """Returns `value` if it is a layer or model of Keras 3 that is built."""
    layer = keras_layer(name, value)
    if not layer.built:
        fail(f"`{name}` must be built: call it once.", **{name: value})
    return layer


def token_shape(layer: str, shape: Shape, min_rank: int = 2) -> int:
    """Returns the model width d of inputs `(..., d)`."""
    if len(shape) < min_rank:
        fail(f"`{layer}` expects inputs of rank {min_rank} or more, (..., d).", shape=shape)
    if shape[-1] is None:
        fail(f"`{layer}` needs a known last dimension d of its inputs (..., d).", shape=shape)
    return int(shape[-1])


def mask_shape(layer: str, inputs: Tensor, mask: Tensor) -> None:
    """Checks that the mask has one entry per token."""
    if not _has_one_per_token(inputs, mask):
        fail(
            f"`{layer}` expects a mask with one entry per token, {_of_tokens(inputs)}.",
            mask_shape=tuple(mask.shape),
        )


def mask_of_ids(layer: str, ids: Tensor, mask: Tensor) -> None:
    """Checks that the mask has one entry per id."""
    if not _has_shape(ids.shape, mask):
        fail(
            f"`{layer}` expects a mask with one entry per id, shape {tuple(ids.shape)}.",
            mask_shape=tuple(mask.shape),
        )


def token_ids(layer: str, inputs: Tensor, ids: Tensor | None) -> None:
    """Checks that there are token ids, that they are integers, and one per token."""
    if ids is None:
        fail(
            f"`{layer}` needs `token_ids` for its router: `layer(x, token_ids=ids)`.",
            token_ids=None,
        )
    dtype = keras.backend.standardize_dtype(ids.dtype)
    if "int" not in dtype:
        fail("`token_ids` must be integers.", dtype=dtype)
    if not _has_one_per_token(inputs, ids):
        fail(
            f"`{layer}` expects `token_ids` with one entry per token, {_of_tokens(inputs)}.",
            token_ids_shape=tuple(ids.shape),
        )


def _of_tokens(inputs: Tensor) -> str:
    return f"shape {tuple(inputs.shape)[:-1]} for inputs of shape {tuple(inputs.shape)}"


def _has_one_per_token(inputs: Tensor, other: Tensor) -> bool:
    return _has_shape(tuple(inputs.shape)[:-1], other)


def _has_shape(shape: Shape, other: Tensor) -> bool:
    expected, received = tuple(shape), tuple(other.shape)
    return len(expected) == len(received) and all(
        a is None or b is None or a == b for a, b in zip(expected, received, strict=True)
    )
