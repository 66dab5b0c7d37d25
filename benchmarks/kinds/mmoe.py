"""MMoE against a loop of Dense layers, and against a chain of matmuls of the same FLOPs.

The row's sizes: T examples of width d, E experts of two layers, h and h/2, and k tasks.
"""

from __future__ import annotations

import numpy as np

from benchmarks import references
from benchmarks.contender import OURS, Case, Comparison, Contender, Options
from benchmarks.peers import mmoe_peers
from benchmarks.rows import FORWARD, GRADIENT, PASSES, Row
from keras_moe.layers import MMoE

LOOP, CHAIN = "loop of Dense", "matmul chain"
TWICE_AS_FAST = 0.5
NEAR_CHAIN = 1.15


def case(row: Row, options: Options) -> Case:
    """Ours / the loop, and ours / the chain; peers / the chain."""
    tokens, width, hidden, experts, tasks = row.sizes
    units = (hidden, hidden // 2)
    inputs = np.random.default_rng(0).normal(size=(tokens, width)).astype("float32")

    def ours() -> MMoE:
        layer = MMoE(experts, units, tasks)
        layer.build((None, width))
        return layer

    peers = mmoe_peers(row, inputs, options) if options.peers else []
    contenders = [
        Contender(OURS, ours, inputs),
        Contender(LOOP, lambda: references.loop_mmoe(width, experts, units, tasks), inputs),
        Contender(CHAIN, lambda: references.mmoe_chain(width, experts, units, tasks), inputs),
        *peers,
    ]
    comparisons = [
        Comparison(OURS, LOOP, {FORWARD: TWICE_AS_FAST, GRADIENT: TWICE_AS_FAST}),
        Comparison(OURS, CHAIN, {FORWARD: NEAR_CHAIN, GRADIENT: NEAR_CHAIN}),
        *(Comparison(peer.name, CHAIN) for peer in peers),
    ]
    return Case(contenders, comparisons, PASSES, {})
