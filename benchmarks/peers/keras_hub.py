"""KerasHub's Mixtral and Qwen3-MoE blocks. They run all experts on all tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.contender import Contender
from benchmarks.controlled_routing import copying_kernel
from benchmarks.rows import Row, Sizes

_FLOAT_BYTES = 4
_HIDDEN_COPIES = 6  # gate, up and their product, and the gradient of each


def _mixtral(sizes: Sizes) -> Any:
    from keras_hub.src.models.mixtral.mixtral_decoder import MixtralSparseMoeBlock

    return MixtralSparseMoeBlock(sizes.width, sizes.hidden, sizes.experts, sizes.top_k)


def _qwen3(sizes: Sizes) -> Any:
    from keras_hub.src.models.qwen3_moe.qwen3_moe_decoder import Qwen3SparseMoeBlock

    return Qwen3SparseMoeBlock(
        sizes.width, sizes.hidden, sizes.experts, sizes.top_k, norm_top_k_prob=True
    )


def _built(block: Any, sizes: Sizes) -> Any:
    block.build((None, None, sizes.width))
    kernel = next(v for v in block.variables if v.shape == (sizes.width, sizes.experts))
    kernel.assign(copying_kernel(sizes.width, sizes.experts))
    return block


def contenders(row: Row, inputs: np.ndarray) -> list[Contender]:
    """Both blocks."""
    sizes = row.sizes
    one_sequence = inputs[None]
    hidden = sizes.tokens * sizes.experts * sizes.hidden * _FLOAT_BYTES

    def contender(name: str, make: Any) -> Contender:
        return Contender(
            name,
            lambda: _built(make(sizes), sizes),
            one_sequence,
            peak_bytes=_HIDDEN_COPIES * hidden,
        )

    return [contender("KerasHub Mixtral", _mixtral), contender("KerasHub Qwen3-MoE", _qwen3)]
