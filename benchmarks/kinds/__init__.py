"""Kinds of rows: one module per kind, with a function `case(row, options)`."""

from __future__ import annotations

import importlib

from benchmarks.contender import Case, Options
from benchmarks.rows import Row


def build_case(row: Row, options: Options) -> Case:
    """The contenders and comparisons of a row."""
    return importlib.import_module(f"benchmarks.kinds.{row.kind}").case(row, options)
