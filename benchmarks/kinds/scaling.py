"""Our layer in the row's sizes against our layer in other sizes."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks import ours
from benchmarks.contender import OURS, Case, Comparison, Contender, Options
from benchmarks.controlled_routing import even_shares, load_facts, routed_inputs
from benchmarks.rows import Row, Sizes


def compare_sizes(
    row: Row, others: Sizes, name: str, options: Options, passes: Sequence[str]
) -> Case:
    """Ours / ours in `others`, which the table calls `name`, for each dispatcher."""
    inputs = routed_inputs(row.sizes, even_shares(row.sizes.experts))
    contenders: list[Contender] = []
    comparisons = []
    other_inputs = routed_inputs(others, even_shares(others.experts))
    pairs = zip(
        ours.contenders(row.sizes, inputs, options.dispatchers, row.capacity_factor),
        ours.contenders(others, other_inputs, options.dispatchers, row.capacity_factor),
        strict=True,
    )
    for layer, other in pairs:
        other = dataclasses.replace(other, name=f"{other.name}, {name}")
        contenders += [layer, other]
        limits = row.limits if layer.name == OURS else {}
        comparisons.append(Comparison(layer.name, other.name, limits))
    facts = {
        **load_facts(inputs, row.sizes),
        **ours.plan_facts(row.sizes, row.capacity_factor),
        "other_sizes": others.label,
        "other_dispatcher": ours.plan_facts(others, row.capacity_factor)["dispatcher"],
    }
    return Case(contenders, comparisons, passes, facts)
