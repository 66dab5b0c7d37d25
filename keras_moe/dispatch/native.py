"""The platform's own grouped matmul: looked for at first use, checked once, never assumed.

A wrong gradient hides behind an absolute tolerance (cuDNN's, for groups that are not aligned,
passed its users' tests), so the check is relative, with ragged and empty groups. And there are
platforms where the native way is correct and E times too slow, so its time is measured too.
"""

import functools
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe.core.types import Tensor
from keras_moe.dispatch import backend

_COUNTS = (37, 0, 91, 1, 0, 60, 3, 64)  # ragged, empty, of no multiple of anything
_TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}  # relative to the largest entry
_SLOWER_AT_MOST = 2.0  # than a batched matmul of the same FLOPs


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


def is_good(dtype: str) -> bool:
    """Whether the native grouped matmul is there, right, and about as fast as a batched matmul."""
    module = _module()
    if module is None or not module.may_have_grouped_matmul():
        return False
    name = keras.backend.backend()
    return _problem(name, dtype) is None and _slowdown(name, dtype) < _SLOWER_AT_MOST


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
        return [ops.cast(each, "float32") for each in (value, *gradients)]

    try:
        found = [ops.convert_to_numpy(each) for each in module.eagerly(compute)]
    except Exception as error:  # whatever a platform's kernel may raise
        return f"it fails with {type(error).__name__}: {error}."
    expected = _by_groups(rows, kernel)
    errors = [np.abs(f - e).max() / np.abs(e).max() for f, e in zip(found, expected, strict=True)]
    if max(errors) > _TOLERANCE[dtype]:
        return f"its largest relative error is {max(errors):.1e}."
    return None


def _by_groups(rows: np.ndarray, kernel: np.ndarray) -> list[np.ndarray]:
    """The value and the gradients of its sum of squares, in float64, group by group."""
    parts = np.split(rows, np.cumsum(_COUNTS)[:-1])
    values = [part @ k for part, k in zip(parts, kernel, strict=True)]
    by_rows = [2 * value @ k.T for value, k in zip(values, kernel, strict=True)]
    by_kernel = [2 * part.T @ value for part, value in zip(parts, values, strict=True)]
    return [np.concatenate(values), np.concatenate(by_rows), np.stack(by_kernel)]


@functools.cache
def _slowdown(backend_name: str, dtype: str) -> float:
    """Time of a grouped matmul over that of a batched one of the same FLOPs."""
    module = _module()
    experts, each, width = 8, 512, 512
    rows = ops.ones((experts * each, width), dtype=dtype)
    kernel = ops.ones((experts, width, width), dtype=dtype)
    ends = ops.convert_to_tensor(np.arange(1, experts + 1, dtype="int32") * each)
    batched = ops.reshape(rows, (experts, each, width))

    def seconds(function: Callable[[], Any]) -> float:
        module.eagerly(function)
        taken = []
        for _ in range(5):
            began = time.perf_counter()
            module.eagerly(function)
            taken.append(time.perf_counter() - began)
        return min(taken)

    grouped = seconds(lambda: module.grouped_matmul(rows, kernel, ends))
    return grouped / max(seconds(lambda: ops.matmul(batched, kernel)), 1e-9)


def _module() -> Any:
    """The backend's module if it has a grouped matmul, or None."""
    return backend.current if backend.current.HAS_GROUPED_MATMUL else None
