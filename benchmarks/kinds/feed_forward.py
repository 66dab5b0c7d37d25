"""The sparse layer against a dense feed-forward layer of the same active FLOPs."""

from __future__ import annotations

from benchmarks import ours, references
from benchmarks.contender import (
    DENSE,
    DENSE_GLU,
    OURS,
    OURS_GLU,
    Case,
    Comparison,
    Contender,
    Options,
)
from benchmarks.controlled_routing import even_shares, load_facts, routed_inputs
from benchmarks.peers import feed_forward_peers
from benchmarks.rows import PASSES, Row


def case(row: Row, options: Options) -> Case:
    """Ours / dense; with peers also ours and theirs, gated, / gated dense."""
    sizes = row.sizes
    inputs = routed_inputs(sizes, even_shares(sizes.experts))
    active = sizes.top_k * sizes.hidden
    layers = ours.contenders(sizes, inputs, options.dispatchers, row.capacity_factor)
    comparisons = [
        Comparison(layer.name, DENSE, row.limits if layer.name == OURS else {}) for layer in layers
    ]
    contenders = [
        *layers,
        Contender(DENSE, lambda: references.dense_ffn(sizes.width, active), inputs),
    ]
    peers = feed_forward_peers(row, inputs, options) if options.peers else []
    if peers:
        # They are gated: so is what they are compared with, and ours beside them.
        contenders += [
            Contender(
                OURS_GLU, lambda: ours.glu_moe(sizes, capacity_factor=row.capacity_factor), inputs
            ),
            Contender(DENSE_GLU, lambda: references.gated_ffn(sizes.width, active), inputs),
            *peers,
        ]
        comparisons += [
            Comparison(name, DENSE_GLU) for name in [OURS_GLU, *(peer.name for peer in peers)]
        ]
    facts = {**load_facts(inputs, sizes), **ours.plan_facts(sizes, row.capacity_factor)}
    return Case(contenders, comparisons, PASSES, facts)
