"""Dropless dispatch with static shapes: a walk over each expert's rows, block by block."""

import keras
from keras import ops

from keras_moe import _checks
from keras_moe._exporting import is_exporting
from keras_moe._sizes import at_least, is_symbolic
from keras_moe.dispatch import backend
from keras_moe.dispatch.carrier import Carrier, ExpertBank, bin_of_assignments
from keras_moe.dispatch.dense import DenseCarrier
from keras_moe.dispatch.permute import as_rows, combine, gather_blocks
from keras_moe.dispatch.plan import block_slots, sort_into_bins
from keras_moe.dispatch.ragged import carry_ragged, takes_groups
from keras_moe.routing import Routing
from keras_moe.types import Config, Tensor

_ROW_MULTIPLE = 8  # what vector units like, and the smallest block
_STATIC_ROWS = 32  # per block, where the batch is unknown and blocks of unknown size will not do


@keras.saving.register_keras_serializable(package="keras_moe")
class BlocksCarrier(Carrier):
    """Sorts assignments by expert and keeps all of them.

    Of a bank such as `ExpertMLP` each expert walks over its own rows, which lie right behind the
    last expert's. Under XLA, which wants static shapes, in blocks of static sizes, at most E times
    (smallest block - 1) rows more than there are; elsewhere on exactly its rows. The backward pass
    is a walk too; it needs what the layers' activations were applied to, and the tokens.

    Other experts, Keras layers, get whole blocks of B rows, each of one expert: at most
    k N + E (B - 1) rows, and the backward pass is automatic.

    Args:
        block_size: Rows per block B where experts are Keras layers, or None to take it from the
            sizes. A bank then takes such blocks too. Defaults to `None`.
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
        if not _takes_dynamic_blocks(experts) and _is_for_export(ops.shape(tokens)[0]):
            # Blocks of Keras layers are a loop whose steps differ, which no export can hold.
            return DenseCarrier()(tokens, routing, experts, training=training)
        walker = backend.current
        if not walker.WALKS or self.block_size is not None or not takes_groups(experts):
            return self._carry_padded(tokens, routing, experts, training)
        total = ops.shape(routing.experts)[0] * routing.experts.shape[-1]
        padding = walker.row_padding(total, experts.num_experts)
        return carry_ragged(tokens, routing, experts, walker.walk, padding, training)

    def _carry_padded(
        self, tokens: Tensor, routing: Routing, experts: ExpertBank, training: bool | None
    ) -> tuple[Tensor, Tensor]:
        num_experts = experts.num_experts
        bin_of = bin_of_assignments(routing, num_experts)
        total = ops.shape(bin_of)[0]
        block_size = self.rows_per_block(total, num_experts)
        is_fixed = _is_for_export(total) or not _takes_dynamic_blocks(experts)
        if not isinstance(block_size, int) and is_fixed:
            block_size = _STATIC_ROWS
        num_blocks = blocks_needed(total, num_experts, block_size)
        slots, block_experts = block_slots(
            sort_into_bins(bin_of, num_experts), num_blocks, block_size
        )
        top_k = routing.experts.shape[-1]
        rows = gather_blocks(tokens, slots, top_k, (num_blocks, block_size))
        outputs = experts(rows, block_experts=block_experts, training=training)
        return combine(as_rows(outputs), slots, routing.weights)

    def rows_per_block(self, total: int | Tensor, num_experts: int) -> int | Tensor:
        """B, about a quarter of an expert's mean load, a multiple of 8: a quarter is padding."""
        if self.block_size is not None:
            return self.block_size
        return at_least(total // (4 * num_experts * _ROW_MULTIPLE) * _ROW_MULTIPLE, _ROW_MULTIPLE)

    def get_config(self) -> Config:
        return {"block_size": self.block_size}


def blocks_needed(total: int | Tensor, num_experts: int, block_size: int | Tensor) -> int | Tensor:
    """The most blocks that `total` assignments to `num_experts` experts can fill, at least one."""
    bound = (total + num_experts * (block_size - 1)) // block_size
    if is_symbolic(total):
        return bound
    fewest = min(total, bound) if isinstance(total, int) else ops.minimum(total, bound)
    return at_least(fewest, 1)


def _is_for_export(size: int | Tensor) -> bool:
    return is_exporting() or is_symbolic(size)


def _takes_dynamic_blocks(experts: ExpertBank) -> bool:
    return bool(getattr(experts, "takes_dynamic_blocks", False))
