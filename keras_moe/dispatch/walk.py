"""The walk: each expert on exactly its own rows."""

from typing import NamedTuple

import keras
from keras import ops

from keras_moe.core.records import Routing
from keras_moe.core.sizes import at_least
from keras_moe.core.types import Size, Tensor
from keras_moe.dispatch import backend
from keras_moe.dispatch.dispatcher import Dispatcher, ExpertBank, bins_of
from keras_moe.dispatch.layout import Rows, Slots
from keras_moe.dispatch.plan import ragged_slots


class RowPlacement(NamedTuple):
    """Assignments sorted by expert, one expert's right behind another's.

    Attributes:
        kept: bool `(N, k)`.
        slots: who is in which slot.
        ends: int32 `(E,)`, where each expert's slots end.
    """

    kept: Tensor
    slots: Slots
    ends: Tensor


@keras.saving.register_keras_serializable(package="keras_moe")
class WalkDispatcher(Dispatcher):
    """Sorts assignments by expert, and each expert of a bank walks over its own rows.

    Under XLA, which wants static shapes, in blocks of static sizes, at most E times (smallest
    block - 1) rows more than there are; elsewhere on exactly its rows. The backward pass is a walk
    too; it needs what the layers' activations were applied to, and the tokens. With a capacity,
    what does not fit is left out of the walk.

    Experts that are Keras layers cannot walk: they get padded blocks.
    """

    name = "walk"
    is_grouped = False

    def place(
        self, routing: Routing, num_experts: int, capacity: Size | None = None, groups: Size = 1
    ) -> RowPlacement:
        count, top_k = ops.shape(routing.experts)
        padding = 0
        if not self.is_grouped:
            padding = backend.current.row_padding(count * top_k, num_experts)
        # Without a capacity nothing competes; a batch of no examples is one group too.
        bins = bins_of(routing, num_experts, 1 if capacity is None else at_least(groups, 1))
        slots, ends = ragged_slots(bins, num_experts, padding, capacity)
        kept = ops.reshape(slots.slot_of < ops.shape(slots.assignment)[0], (top_k, -1))
        return RowPlacement(ops.transpose(kept), slots, ends)

    def run(
        self,
        tokens: Tensor,
        weights: Tensor,
        placement: RowPlacement,
        experts: ExpertBank,
        training: bool | None = None,
    ) -> Tensor:
        rows = Rows(weights, placement.slots, placement.ends, self.is_grouped)
        return experts(tokens, rows=rows, training=training)
