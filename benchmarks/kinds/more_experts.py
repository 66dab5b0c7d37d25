"""The same tokens and the same k, spread over more experts: the work is the same."""

from __future__ import annotations

from benchmarks.contender import Case, Options
from benchmarks.kinds.scaling import compare_sizes
from benchmarks.rows import PASSES, Row

FEW = 8


def case(row: Row, options: Options) -> Case:
    """Ours with E experts / ours with 8 (with E/2 where that is fewer)."""
    few = min(FEW, row.sizes.experts // 2)
    few_experts = row.sizes._replace(experts=few, top_k=min(row.sizes.top_k, few))
    return compare_sizes(row, few_experts, f"{few} experts", options, PASSES)
