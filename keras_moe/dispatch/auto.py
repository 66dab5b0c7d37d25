"""The carrier behind `dispatch="auto"`."""

import keras
from keras import ops

from keras_moe.dispatch import native
from keras_moe.dispatch.blocks import BlocksCarrier
from keras_moe.dispatch.carrier import Carrier, ExpertBank
from keras_moe.dispatch.costs import dropless_costs
from keras_moe.dispatch.dense import DenseCarrier
from keras_moe.dispatch.grouped import GroupedCarrier
from keras_moe.dispatch.lookup import LookupCarrier
from keras_moe.dispatch.ragged import takes_groups
from keras_moe.routing import Routing
from keras_moe.types import Tensor

DROPLESS: dict[str, type[Carrier]] = {
    carrier.name: carrier
    for carrier in (BlocksCarrier, DenseCarrier, GroupedCarrier, LookupCarrier)
}
_MANY = 1 << 16  # tokens, where a graph is traced for any number: as in training


class AutoCarrier(Carrier):
    """Takes, for each number of tokens it meets, the dropless carrier with the least cost."""

    name = "auto"

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
        count = ops.shape(tokens)[0]
        costs = self.costs(
            max(count, 1) if isinstance(count, int) else _MANY,
            experts.num_experts,
            routing.experts.shape[-1],
            is_bank=takes_groups(experts),
            dtype=keras.backend.standardize_dtype(tokens.dtype),
            training=bool(training),
        )
        carrier = DROPLESS[min(costs, key=lambda name: costs[name])]()
        return carrier(
            tokens, routing, experts, capacity=capacity, groups=groups, training=training
        )

    @staticmethod
    def costs(
        num_tokens: int, num_experts: int, top_k: int, *, is_bank: bool, dtype: str, training: bool
    ) -> dict[str, float]:
        """Predicted cost by carrier, in rows of the experts; see `dropless_costs`."""
        return dropless_costs(
            num_tokens,
            num_experts,
            top_k,
            training=training,
            is_bank=is_bank,
            grouped=is_bank and native.is_good(dtype),
        )
