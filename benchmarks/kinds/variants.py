"""The same layer in other sizes, or measured by something other than its time."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from benchmarks import ours
from benchmarks.contender import OURS, Case, Comparison, Contender, Options
from benchmarks.controlled_routing import even_shares, load_facts, routed_inputs
from benchmarks.kinds import feed_forward
from benchmarks.rows import GRADIENT, PASSES, Row, Sizes

FEW = 8


def more_experts(row: Row, options: Options, passes: Sequence[str] = PASSES) -> Case:
    """Ours with E experts / ours with 8 (E/2 where that is fewer): as much work, spread wider."""
    few = min(FEW, row.sizes.experts // 2)
    few_experts = row.sizes._replace(experts=few, top_k=min(row.sizes.top_k, few))
    return _compare_sizes(row, few_experts, f"{few} experts", options, passes)


def more_tokens(row: Row, options: Options) -> Case:
    """Ours with T tokens / ours with T/2: twice the work, and no more than that in time."""
    half = row.sizes._replace(tokens=row.sizes.tokens // 2)
    return _compare_sizes(row, half, f"{half.tokens} tokens", options, PASSES)


def compile_time(row: Row, options: Options) -> Case:
    """The training step of `more_experts`: the time to compile it must not grow with E."""
    return more_experts(row, options, (GRADIENT,))


def memory(row: Row, options: Options) -> Case:
    """The training step of `feed_forward` without peers: what it takes beyond the weights."""
    whole = feed_forward.case(row, dataclasses.replace(options, peers=False))
    return dataclasses.replace(whole, passes=(GRADIENT,))


def _compare_sizes(
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
