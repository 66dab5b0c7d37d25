"""Dropless dispatch with static shapes: each expert's rows, padded to whole blocks."""

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.dispatch.carrier import (
    Carrier,
    ExpertBank,
    bin_of_assignments,
    combine,
    gather_tokens,
)
from keras_moe.dispatch.plan import block_slots, sort_into_bins
from keras_moe.routing import Routing
from keras_moe.types import Config, Tensor

_ROW_MULTIPLE = 8  # what vector units like, and the smallest block
_STATIC_ROWS = 32  # per block, where the batch is dynamic and the experts cannot take that


@keras.saving.register_keras_serializable(package="keras_moe")
class BlocksCarrier(Carrier):
    """Sorts assignments by expert, pads each expert to whole blocks of B rows, keeps everything.

    A block belongs to one expert, so a batched matmul with the blocks' weights is the whole work:
    at most k N + E (B - 1) rows, where running all experts on all tokens takes E N.

    Args:
        block_size: Rows per block B, or None to take it from the sizes. Defaults to `None`.
    """

    name = "blocks"

    def __init__(self, block_size: int | None = None) -> None:
        if block_size is not None:
            _checks.positive_int("block_size", block_size)
        self.block_size = block_size

    def __call__(
        self,
        tokens: Tensor,
        routing: Routing,
        experts: ExpertBank,
        *,
        capacity: int | Tensor | None = None,
        groups: int | Tensor = 1,
        training: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        del capacity, groups  # dropless: there is nothing to compete for
        num_experts = experts.num_experts
        bin_of = bin_of_assignments(routing, num_experts)
        total = ops.shape(bin_of)[0]
        block_size = self.rows_per_block(total, num_experts)
        if not isinstance(block_size, int) and not getattr(experts, "takes_dynamic_blocks", False):
            block_size = _STATIC_ROWS
        num_blocks = blocks_needed(total, num_experts, block_size)
        slots, block_experts = block_slots(
            sort_into_bins(bin_of, num_experts), num_blocks, block_size
        )
        rows = gather_tokens(tokens, slots)
        rows = ops.reshape(rows, (num_blocks, block_size, tokens.shape[-1]))
        outputs = experts(rows, block_experts=block_experts, training=training)
        outputs = ops.reshape(outputs, (num_blocks * block_size, outputs.shape[-1]))
        return combine(outputs, slots, routing)

    def rows_per_block(self, total: int | Tensor, num_experts: int) -> int | Tensor:
        """B, about a quarter of an expert's mean load, a multiple of 8.

        Then at most about a quarter of the rows is padding, and the blocks' copies of the weights
        are about five times the bank, however many tokens there are.
        """
        if self.block_size is not None:
            return self.block_size
        rows = total // (4 * num_experts * _ROW_MULTIPLE) * _ROW_MULTIPLE
        if isinstance(rows, int):
            return max(rows, _ROW_MULTIPLE)
        return ops.maximum(rows, _ROW_MULTIPLE)

    def get_config(self) -> Config:
        return {"block_size": self.block_size}


def blocks_needed(total: int | Tensor, num_experts: int, block_size: int | Tensor) -> int | Tensor:
    """The most blocks that `total` assignments to `num_experts` experts can fill, at least one."""
    bound = (total + num_experts * (block_size - 1)) // block_size
    if isinstance(total, int):
        return max(min(total, bound), 1)
    return ops.maximum(ops.minimum(total, bound), 1)
