"""The sparse layer on an accelerator: against dense layers, and against its products alone."""

from __future__ import annotations

import numpy as np

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

BATCHED = "batched"


def case(row: Row, options: Options) -> Case:
    """Ours / dense of equal active FLOPs, ours / batched products of as many rows, and peers.

    "batched" is what a mixture costs at least where all its weights are read: both products of all
    experts on equal shares of the assignments, the activation, and the sum over choices; no
    routing, no gathering.
    """
    sizes = row.sizes
    inputs = routed_inputs(sizes, even_shares(sizes.experts))
    active = sizes.top_k * sizes.hidden
    layers = ours.contenders(sizes, inputs, options.dispatchers, None)
    shares = np.tile(inputs, (sizes.top_k, 1)).reshape(sizes.experts, -1, sizes.width)
    contenders = [
        *layers,
        Contender(DENSE, lambda: references.dense_ffn(sizes.width, active), inputs),
        Contender(BATCHED, lambda: references.batched_ffn(sizes), shares),
    ]
    comparisons = [
        Comparison(
            layer.name, against, row.limits if (layer.name, against) == (OURS, DENSE) else {}
        )
        for layer in layers
        for against in (DENSE, BATCHED)
    ]
    peers = feed_forward_peers(row, inputs, options) if options.peers else []
    # Both blocks of transformers compute the same, and a loop over experts is beside the point.
    peers = [peer for peer in peers if "Qwen3-MoE grouped_mm" in peer.name]
    if peers:
        contenders += [
            Contender(OURS_GLU, lambda: ours.glu_moe(sizes), inputs),
            Contender(DENSE_GLU, lambda: references.gated_ffn(sizes.width, active), inputs),
            *peers,
        ]
        comparisons += [
            Comparison(name, DENSE_GLU) for name in [OURS_GLU, *(peer.name for peer in peers)]
        ]
    facts = {**load_facts(inputs, sizes), **ours.plan_facts(sizes, None)}
    return Case(contenders, comparisons, PASSES, facts)
