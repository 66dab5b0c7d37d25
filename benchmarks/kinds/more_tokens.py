"""Twice the tokens: twice the work, and no more than that in time."""

from __future__ import annotations

from benchmarks.contender import Case, Options
from benchmarks.kinds.scaling import compare_sizes
from benchmarks.rows import PASSES, Row


def case(row: Row, options: Options) -> Case:
    """Ours with T tokens / ours with T/2."""
    half = row.sizes._replace(tokens=row.sizes.tokens // 2)
    return compare_sizes(row, half, f"{half.tokens} tokens", options, PASSES)
