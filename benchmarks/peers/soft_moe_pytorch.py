"""soft-moe-pytorch's SoftMoE: a Python loop over experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.contender import Contender
from benchmarks.peers.on_torch import prepare
from benchmarks.rows import Row


def contenders(row: Row, inputs: np.ndarray) -> list[Contender]:
    """Its layer with one slot per expert, and experts of our kind: two matmuls and gelu."""
    sizes = row.sizes

    def make() -> Any:
        from soft_moe_pytorch import SoftMoE

        return prepare(
            SoftMoE(
                sizes.width,
                num_slots=1,
                num_experts=sizes.experts,
                expert_mult=sizes.hidden / sizes.width,
            )
        )

    return [Contender("soft-moe-pytorch", make, inputs)]
