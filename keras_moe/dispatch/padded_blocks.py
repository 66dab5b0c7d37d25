"""Dropless dispatch with static shapes: whole blocks of rows, each of one expert."""

from typing import NamedTuple

import keras
from keras import ops

from keras_moe.core import checks
from keras_moe.core.exporting import is_exporting
from keras_moe.core.records import Routing
from keras_moe.core.sizes import at_least, is_symbolic
from keras_moe.core.types import Config, Size, Tensor
from keras_moe.dispatch.dispatcher import Dispatcher, ExpertBank, bins_of, kept_within
from keras_moe.dispatch.layout import Slots
from keras_moe.dispatch.permute import as_rows, combine, gather_blocks
from keras_moe.dispatch.plan import block_slots

_ROW_MULTIPLE = 8  # what vector units like, and the smallest block
_STATIC_ROWS = 32  # per block, where the batch is unknown and blocks of unknown size will not do


class BlockPlacement(NamedTuple):
    """Assignments in blocks of rows of one expert each.

    Attributes:
        kept: bool `(N, k)`.
        slots: who is in which slot.
        block_experts: int32 `(G,)`, the expert of each block.
        block_size: rows per block B.
    """

    kept: Tensor
    slots: Slots
    block_experts: Tensor
    block_size: Size


@keras.saving.register_keras_serializable(package="keras_moe")
class PaddedBlocksDispatcher(Dispatcher):
    """Sorts assignments by expert into whole blocks of B rows, each of one expert.

    At most k N + E (B - 1) rows, and the backward pass is automatic: for experts that are Keras
    layers, and for exports.

    Args:
        block_size: Rows per block B, or None to take it from the sizes. Defaults to `None`.
        has_static_blocks: Whether B must be known where the batch is not. Defaults to `False`.
    """

    name = "padded_blocks"

    def __init__(self, block_size: int | None = None, has_static_blocks: bool = False) -> None:
        if block_size is not None:
            checks.positive_int("block_size", block_size)
        self.block_size = block_size
        self.has_static_blocks = bool(has_static_blocks)

    def place(
        self, routing: Routing, num_experts: int, capacity: Size | None = None, groups: Size = 1
    ) -> BlockPlacement:
        kept = kept_within(routing, num_experts, capacity, groups)
        bins = bins_of(routing._replace(kept=kept), num_experts)
        total = ops.shape(bins.bin_of)[0]
        block_size = self.rows_per_block(total, num_experts)
        if not isinstance(block_size, int) and (is_for_export(total) or self.has_static_blocks):
            block_size = _STATIC_ROWS
        num_blocks = blocks_needed(total, num_experts, block_size)
        slots, block_experts = block_slots(bins, num_blocks, block_size)
        return BlockPlacement(kept, slots, block_experts, block_size)

    def run(
        self,
        tokens: Tensor,
        weights: Tensor,
        placement: BlockPlacement,
        experts: ExpertBank,
        training: bool | None = None,
    ) -> Tensor:
        _, slots, block_experts, block_size = placement
        shape = (ops.shape(block_experts)[0], block_size)
        rows = gather_blocks(tokens, slots, weights.shape[-1], shape)
        outputs = experts(rows, block_experts=block_experts, training=training)
        return combine(as_rows(outputs), slots, weights)

    def rows_per_block(self, total: Size, num_experts: int) -> Size:
        """B, about a quarter of an expert's mean load, a multiple of 8: a quarter is padding."""
        if self.block_size is not None:
            return self.block_size
        return at_least(total // (4 * num_experts * _ROW_MULTIPLE) * _ROW_MULTIPLE, _ROW_MULTIPLE)

    def get_config(self) -> Config:
        return {"block_size": self.block_size, "has_static_blocks": self.has_static_blocks}


def blocks_needed(total: Size, num_experts: int, block_size: Size) -> Size:
    """The most blocks that `total` assignments to `num_experts` experts can fill, at least one."""
    bound = (total + num_experts * (block_size - 1)) // block_size
    if is_symbolic(total):
        return bound
    fewest = min(total, bound) if isinstance(total, int) else ops.minimum(total, bound)
    return at_least(fewest, 1)


def is_for_export(size: Size) -> bool:
    """Whether a program is traced that cannot hold a loop over steps of unknown size."""
    return is_exporting() or is_symbolic(size)
