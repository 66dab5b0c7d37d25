"""Outputs of layers, and the loss that is differentiated."""

from __future__ import annotations

from typing import Any


def outputs_of(result: Any) -> list[Any]:
    """The output tensors: the first of a tuple (the rest are diagnostics), all of a list."""
    if isinstance(result, tuple):
        result = result[0]
    return list(result) if isinstance(result, list) else [result]
