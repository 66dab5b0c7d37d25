"""The time to compile a training step: it must not grow with the number of experts."""

from __future__ import annotations

from benchmarks.contender import Case, Options
from benchmarks.kinds.more_experts import FEW
from benchmarks.kinds.scaling import compare_sizes
from benchmarks.rows import GRADIENT, Row


def case(row: Row, options: Options) -> Case:
    """Ours with E experts / ours with 8."""
    few = min(FEW, row.sizes.experts // 2)
    few_experts = row.sizes._replace(experts=few, top_k=min(row.sizes.top_k, few))
    return compare_sizes(row, few_experts, f"{few} experts", options, (GRADIENT,))
