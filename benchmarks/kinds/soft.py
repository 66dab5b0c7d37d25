"""Soft MoE with as many slots as tokens: each expert runs once per sequence, as a dense layer does.

The row's sizes: T tokens in all, in sequences of E tokens, E experts with one slot each.
"""

from __future__ import annotations

import numpy as np

from benchmarks import references
from benchmarks.contender import DENSE, OURS, Case, Comparison, Contender, Options
from benchmarks.peers import soft_peers
from benchmarks.rows import PASSES, Row
from keras_moe.layers import SoftMoE


def case(row: Row, options: Options) -> Case:
    """Ours / a dense layer of hidden width h on the same tokens; peers / the same."""
    sizes = row.sizes
    length = sizes.experts
    shape = (sizes.tokens // length, length, sizes.width)
    inputs = np.random.default_rng(0).normal(size=shape).astype("float32")

    def ours() -> SoftMoE:
        layer = SoftMoE(sizes.experts, sizes.hidden)
        layer.build((None, length, sizes.width))
        return layer

    peers = soft_peers(row, inputs, options) if options.peers else []
    contenders = [
        Contender(OURS, ours, inputs),
        Contender(DENSE, lambda: references.dense_ffn(sizes.width, sizes.hidden), inputs),
        *peers,
    ]
    comparisons = [
        Comparison(OURS, DENSE, row.limits),
        *(Comparison(peer.name, DENSE) for peer in peers),
    ]
    return Case(contenders, comparisons, PASSES, {"sequences": f"{shape[0]} of {length} tokens"})
