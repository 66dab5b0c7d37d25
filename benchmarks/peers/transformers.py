"""Hugging Face transformers' Mixtral and Qwen3-MoE blocks, with each way it has to run experts."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.contender import Contender
from benchmarks.peers.on_torch import prepare
from benchmarks.rows import Row, Sizes

# "eager" is a loop over experts; "grouped_mm" is torch's grouped matmul.
IMPLEMENTATIONS = ("eager", "grouped_mm")


def _mixtral(sizes: Sizes, implementation: str) -> Any:
    from transformers.models.mixtral.configuration_mixtral import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    config = MixtralConfig(
        hidden_size=sizes.width,
        intermediate_size=sizes.hidden,
        num_local_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        experts_implementation=implementation,
    )
    return MixtralSparseMoeBlock(config)


def _qwen3(sizes: Sizes, implementation: str) -> Any:
    from transformers.models.qwen3_moe.configuration_qwen3_moe import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=sizes.width,
        moe_intermediate_size=sizes.hidden,
        num_experts=sizes.experts,
        num_experts_per_tok=sizes.top_k,
        norm_topk_prob=True,
        experts_implementation=implementation,
    )
    return Qwen3MoeSparseMoeBlock(config)


def _prepared(block: Any, implementation: str) -> Any:
    used = block.experts.config._experts_implementation
    if used != implementation:
        raise RuntimeError(f"transformers took the implementation {used!r}, not the asked one.")
    return prepare(block, block.gate.weight)


def contenders(row: Row, inputs: np.ndarray) -> list[Contender]:
    """Both blocks, in both implementations."""
    sizes = row.sizes

    def contender(name: str, make: Any, implementation: str) -> Contender:
        return Contender(
            f"transformers {name} {implementation}",
            lambda: _prepared(make(sizes, implementation), implementation),
            inputs[None],
        )

    return [
        contender(name, make, implementation)
        for name, make in (("Mixtral", _mixtral), ("Qwen3-MoE", _qwen3))
        for implementation in IMPLEMENTATIONS
    ]
