"""st-moe-pytorch's MoE: a capacity, and one-hot masks of tokens x slots."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.contender import Contender
from benchmarks.peers.on_torch import prepare
from benchmarks.rows import Row

# Its masks grow with the square of a group. Short groups are to its advantage.
_LONGEST_GROUP = 512


def contenders(row: Row, inputs: np.ndarray) -> list[Contender]:
    """Its layer with our capacity: it leaves k out of its formula, so k goes into its factor."""
    sizes = row.sizes
    factor = row.capacity_factor * sizes.top_k

    def make() -> Any:
        from st_moe_pytorch import MoE

        module = MoE(
            dim=sizes.width,
            num_experts=sizes.experts,
            gating_top_n=sizes.top_k,
            # Its hidden width is int(2/3 * factor * d): the half keeps rounding away.
            expert_hidden_mult=(sizes.hidden + 0.5) * 1.5 / sizes.width,
            threshold_train=0.0,  # no second expert is left out at random
            threshold_eval=0.0,
            capacity_factor_train=factor,
            capacity_factor_eval=factor,
        )
        return prepare(module, module.gate.to_gates.weight)

    groups = inputs.reshape(-1, min(_LONGEST_GROUP, sizes.tokens), sizes.width)
    return [
        Contender("st-moe-pytorch", make, groups, losses_of=lambda result: [result.total_aux_loss])
    ]
