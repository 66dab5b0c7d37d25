"""Dropless dispatch with static shapes: a walk over each expert's rows, block by block."""

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.dispatch import backend
from keras_moe.dispatch.carrier import Carrier, ExpertBank, bin_of_assignments
from keras_moe.dispatch.permute import combine, gather_tokens
from keras_moe.dispatch.plan import block_slots, sort_into_bins
from keras_moe.dispatch.ragged import carry_ragged, takes_groups
from keras_moe.routing import Routing
from keras_moe.types import Config, Tensor

_ROW_MULTIPLE = 8  # what vector units like, and the smallest block
_STATIC_ROWS = 32  # per block, where the batch is dynamic and the experts cannot take that


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
        walker = backend.current()
        if walker is None or self.block_size is not None or not takes_groups(experts):
            return self._carry_padded(tokens, routing, experts, training)
        total = ops.shape(routing.experts)[0] * routing.experts.shape[-1]
        padding = walker.row_padding(total, experts.num_experts)
        return carry_ragged(tokens, routing, experts, walker.carry, padding, training)

    def _carry_padded(
        self, tokens: Tensor, routing: Routing, experts: ExpertBank, training: bool | None
    ) -> tuple[Tensor, Tensor]:
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
        rows = gather_tokens(tokens, slots, routing.experts.shape[-1])
        rows = ops.reshape(rows, (num_blocks, block_size, tokens.shape[-1]))
        outputs = experts(rows, block_experts=block_experts, training=training)
        outputs = ops.reshape(outputs, (num_blocks * block_size, outputs.shape[-1]))
        return combine(outputs, slots, routing.weights)

    def rows_per_block(self, total: int | Tensor, num_experts: int) -> int | Tensor:
        """B, about a quarter of an expert's mean load, a multiple of 8: a quarter is padding."""
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
