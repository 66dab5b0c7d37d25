"""C slots for every expert: a batched matmul of static size."""

from typing import NamedTuple

import keras
from keras import ops

from keras_moe.core.records import Routing
from keras_moe.core.types import Size, Tensor
from keras_moe.dispatch.dispatcher import Dispatcher, ExpertBank, bins_of, needed
from keras_moe.dispatch.layout import Slots
from keras_moe.dispatch.permute import as_rows, combine, gather_blocks
from keras_moe.dispatch.plan import capacity_slots


class SlotPlacement(NamedTuple):
    """Assignments in rows of slots, one row for each expert.

    Attributes:
        kept: bool `(N, k)`.
        slots: who is in which slot.
        shape: E, and the slots of an expert, those of all groups.
    """

    kept: Tensor
    slots: Slots
    shape: tuple[int, Size]


@keras.saving.register_keras_serializable(package="keras_moe")
class SlotsDispatcher(Dispatcher):
    """Gives every expert C slots per group, first choices first: E C rows whatever the routing.

    Costs capacity_factor times the chosen experts' FLOPs. An assignment past the C-th of its expert
    is dropped and adds exactly 0 to its token.
    """

    name = "slots"
    needs_capacity = True

    def place(
        self, routing: Routing, num_experts: int, capacity: Size | None = None, groups: Size = 1
    ) -> SlotPlacement:
        capacity = needed(capacity, self.name)
        slots = capacity_slots(bins_of(routing, num_experts, groups), capacity)
        kept = ops.reshape(
            slots.slot_of < ops.shape(slots.assignment)[0], (routing.experts.shape[-1], -1)
        )
        return SlotPlacement(ops.transpose(kept), slots, (num_experts, groups * capacity))

    def run(
        self,
        tokens: Tensor,
        weights: Tensor,
        placement: SlotPlacement,
        experts: ExpertBank,
        training: bool | None = None,
    ) -> Tensor:
        _, slots, shape = placement
        rows = gather_blocks(tokens, slots, weights.shape[-1], shape)
        return combine(as_rows(experts(rows, training=training)), slots, weights)
