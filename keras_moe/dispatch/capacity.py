"""Static slots per expert; what does not fit is dropped."""

import keras
from keras import ops

from keras_moe.dispatch.carrier import (
    Carrier,
    ExpertBank,
    bin_of_assignments,
)
from keras_moe.dispatch.permute import combine, gather_tokens
from keras_moe.dispatch.plan import capacity_slots, sort_into_bins
from keras_moe.routing import Routing
from keras_moe.types import Tensor


@keras.saving.register_keras_serializable(package="keras_moe")
class CapacityCarrier(Carrier):
    """Gives every expert C slots per group, first choices first: E C rows whatever the routing.

    Costs capacity_factor times the chosen experts' FLOPs. An assignment past the C-th of its expert
    is dropped and adds exactly 0 to its token.
    """

    name = "capacity"
    has_capacity = True

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
        if capacity is None:
            raise ValueError("The capacity carrier needs a `capacity_factor`. Received: None")
        num_experts = experts.num_experts
        bin_of = bin_of_assignments(routing, num_experts, groups)
        slots = capacity_slots(sort_into_bins(bin_of, num_experts * groups), capacity)
        rows = gather_tokens(tokens, slots, routing.experts.shape[-1])
        rows = ops.reshape(rows, (num_experts, groups * capacity, tokens.shape[-1]))
        outputs = experts(rows, training=training)
        outputs = ops.reshape(outputs, (num_experts * groups * capacity, outputs.shape[-1]))
        return combine(outputs, slots, routing.weights)
