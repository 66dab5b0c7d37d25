"""Uneven routing against even routing, the layer and the sizes being the same."""

from __future__ import annotations

import dataclasses

from benchmarks import ours
from benchmarks.contender import OURS, Case, Comparison, Options
from benchmarks.controlled_routing import even_shares, load_facts, routed_inputs, zipf_shares
from benchmarks.rows import PASSES, Row


def case(row: Row, options: Options) -> Case:
    """Ours, tokens that choose experts by Zipf's law / ours, tokens that choose them evenly."""
    sizes = row.sizes
    even = routed_inputs(sizes, even_shares(sizes.experts))
    skewed = routed_inputs(sizes, zipf_shares(sizes.experts))
    contenders, comparisons = [], []
    for layer in ours.contenders(sizes, even, options.dispatchers, row.capacity_factor):
        evenly = dataclasses.replace(layer, name=f"{layer.name}, even")
        contenders += [dataclasses.replace(layer, inputs=skewed), evenly]
        limits = row.limits if layer.name == OURS else {}
        comparisons.append(Comparison(layer.name, evenly.name, limits))
    facts = {
        **load_facts(skewed, sizes),
        "even_load_max_over_mean": load_facts(even, sizes)["load_max_over_mean"],
    }
    return Case(contenders, comparisons, PASSES, facts)
