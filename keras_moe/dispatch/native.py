"""The platform's grouped matmul: known by the kind of device, checked once, never assumed.

A wrong gradient hides behind an absolute tolerance (cuDNN's, for groups that are not aligned,
passed its users' tests), so the check is relative, with ragged and empty groups. And there are
platforms where the native way is correct and E times too slow: those are known by their kind.
"""

import functools
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe.core.types import Tensor
from keras_moe.dispatch import backend

_COUNTS = (37, 0, 91, 1, 0, 60, 3, 64)  # ragged, empty, of no multiple of anything
_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}  # relative to the largest entry
_WORSE_AT_MOST = 8.0  # than a plain product here: a GPU may take float32 for tf32, at 1e-3


def matmul(rows: Tensor, kernel: Tensor, ends: Tensor) -> Tensor:
    """rows[start:end] @ kernel[e] for each expert e.

    Args:
        rows: `(S, in)`, sorted by expert.
        kernel: `(E, in, out)`.
        ends: int32 `(E,)`, where each expert's rows end.

    Returns:
        `(S, out)`.

    Raises:
        ValueError: as `check`.
    """
    check(keras.backend.standardize_dtype(rows.dtype))
    return _module().grouped_matmul(rows, kernel, ends)


def check(dtype: str) -> None:
    """Makes sure that there is a native grouped matmul and that it computes what it should.

    Raises:
        ValueError: if the backend has none, or it is wrong on this platform.
    """
    problem = _problem(keras.backend.backend(), dtype)
    if problem:
        raise ValueError(
            f"`dispatch='grouped'` cannot be used here: {problem} Use 'auto' or 'walk'. "
            f"Received: backend={keras.backend.backend()!r}, dtype={dtype!r}"
        )


def is_good(dtype: str, is_known: bool = True) -> bool:
    """Whether this kind of device has a native grouped matmul worth using, and it is right.

    By kind, never by a time: two processes of one program must not choose differently.

    Args:
        dtype: of the rows.
        is_known: whether their number is.
    """
    module = _module()
    if module is None or not module.may_have_grouped_matmul(is_known):
        return False
    return _problem(keras.backend.backend(), dtype) is None


def problem(dtype: str) -> str | None:
    """Says why "auto" leaves the native grouped matmul out for any number of rows, or None."""
    module = _module()
    if module is not None and not module.may_have_grouped_matmul(True):
        return "this kind of device has none that beats a walk."
    return _problem(keras.backend.backend(), dtype)


@functools.cache
def _problem(backend_name: str, dtype: str) -> str | None:
    """Says what is wrong with the native grouped matmul, or None."""
    module = _module()
    if module is None:
        return f"{backend_name} has no grouped matmul."
    if dtype not in _TOLERANCE:
        return f"it was never checked in {dtype}."
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(sum(_COUNTS), 32))
    kernel = rng.normal(size=(len(_COUNTS), 32, 48))

    def compute() -> Any:
        ends = ops.convert_to_tensor(np.cumsum(_COUNTS).astype("int32"))
        arguments = [
            ops.cast(ops.convert_to_tensor(array.astype("float32")), dtype)
            for array in (rows, kernel)
        ]
        value, gradients = module.value_and_gradients(
            lambda rows, kernel: module.grouped_matmul(rows, kernel, ends), *arguments
        )
        plain = ops.matmul(arguments[0], arguments[1][0])
        return [ops.cast(each, "float32") for each in (plain, value, *gradients)]

    try:
        plain, *found = [ops.convert_to_numpy(each) for each in module.eagerly(compute)]
    except Exception as error:  # whatever a platform's kernel may raise
        return f"it fails with {type(error).__name__}: {error}."
    errors = list(map(_relative_error, found, _by_groups(rows, kernel)))
    tolerance = max(_TOLERANCE[dtype], _WORSE_AT_MOST * _relative_error(plain, rows @ kernel[0]))
    if max(errors) > tolerance:
        return f"its largest relative error is {max(errors):.1e}, over {tolerance:.1e}."
    return None


def _relative_error(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def _by_groups(rows: np.ndarray, kernel: np.ndarray) -> list[np.ndarray]:
    """The value and the gradients of its sum of squares, in float64, group by group."""
    parts = np.split(rows, np.cumsum(_COUNTS)[:-1])
    values = [part @ k for part, k in zip(parts, kernel, strict=True)]
    by_rows = [2 * value @ k.T for value, k in zip(values, kernel, strict=True)]
    by_kernel = [2 * part.T @ value for part, value in zip(parts, values, strict=True)]
    return [np.concatenate(values), np.concatenate(by_rows), np.stack(by_kernel)]


def _module() -> Any:
    """The backend's module if it has a grouped matmul, or None."""
    return backend.current if backend.current.HAS_GROUPED_MATMUL else None
