"""The sparse layer on an accelerator: against dense layers, and against its products alone."""

from __future__ import annotations

import dataclasses

import numpy as np

from benchmarks import references
from benchmarks.contender import DENSE, OURS, Case, Comparison, Contender, Options
from benchmarks.kinds import feed_forward
from benchmarks.rows import Row

BATCHED = "batched"
# Both blocks of transformers compute the same, and a loop over experts is beside the point.
PEER = "transformers Qwen3-MoE grouped_mm"


def case(row: Row, options: Options) -> Case:
    """Ours / dense of equal active FLOPs, ours / batched products of as many rows, and one peer.

    "batched" is what a mixture costs at least where all its weights are read: both products of all
    experts on equal shares of the assignments, the activation, and the sum over choices; no
    routing, no gathering.
    """
    sizes, plain = row.sizes, feed_forward.case(row, options)
    contenders = [each for each in plain.contenders if _takes_part(each.name)]
    comparisons = [each for each in plain.comparisons if _takes_part(each.subject)]
    inputs = contenders[0].inputs
    shares = np.tile(inputs, (sizes.top_k, 1)).reshape(sizes.experts, -1, sizes.width)
    products = Contender(BATCHED, lambda: references.batched_ffn(sizes), shares)
    return dataclasses.replace(
        plain,
        contenders=[*contenders, products],
        comparisons=[
            *comparisons,
            *(Comparison(each.subject, BATCHED) for each in comparisons if each.against == DENSE),
        ],
    )


def _takes_part(name: str) -> bool:
    return name.startswith((OURS, DENSE)) or name == PEER
