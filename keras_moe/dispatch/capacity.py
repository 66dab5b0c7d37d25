"""At most C assignments per expert; what does not fit is dropped."""

import keras
from keras import ops

from keras_moe.dispatch import backend
from keras_moe.dispatch.blocks import BlocksCarrier
from keras_moe.dispatch.carrier import (
    Carrier,
    ExpertBank,
    bin_of_assignments,
)
from keras_moe.dispatch.costs import walk_beats_slots
from keras_moe.dispatch.layout import Bins
from keras_moe.dispatch.permute import as_rows, combine, gather_blocks
from keras_moe.dispatch.plan import capacity_slots, sort_into_bins
from keras_moe.dispatch.ragged import takes_groups
from keras_moe.routing import Routing
from keras_moe.types import Tensor


@keras.saving.register_keras_serializable(package="keras_moe")
class CapacityCarrier(Carrier):
    """Gives every expert C slots per group, first choices first: E C rows whatever the routing.

    Costs capacity_factor times the chosen experts' FLOPs. An assignment past the C-th of its expert
    is dropped and adds exactly 0 to its token. On a CPU, where many slots would stay empty or a
    batched matmul is slow, each expert of a bank walks over the rows it keeps instead, as
    `BlocksCarrier` does.
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
        bins = sort_into_bins(bin_of, num_experts * groups)
        if self._walks(tokens, routing, experts, num_experts * groups * capacity):
            kept = _kept_within(bins, capacity, routing)
            return BlocksCarrier()(tokens, routing._replace(kept=kept), experts, training=training)
        slots = capacity_slots(bins, capacity)
        top_k = routing.experts.shape[-1]
        rows = gather_blocks(tokens, slots, top_k, (num_experts, groups * capacity))
        outputs = experts(rows, training=training)
        return combine(as_rows(outputs), slots, routing.weights)

    @staticmethod
    def _walks(
        tokens: Tensor, routing: Routing, experts: ExpertBank, num_slots: int | Tensor
    ) -> bool:
        """Whether the rows that are kept cost less one expert after another."""
        if not takes_groups(experts) or not backend.current.is_on_cpu(tokens):
            return False
        assigned = ops.shape(routing.experts)[0] * routing.experts.shape[-1]
        weights = experts.count_params()
        return walk_beats_slots(assigned, num_slots, experts.num_experts, weights)


def kept_by_priority(
    routing: Routing,
    priority: Tensor,
    num_experts: int,
    capacity: int | Tensor,
    groups: int | Tensor = 1,
) -> Tensor:
    """The assignments that find a slot where tokens are not served in the order they stand in.

    Args:
        routing: the record of a router, `(N, k)`.
        priority: `(N,)`, larger first; of equal ones, the earlier token.
        num_experts: the number of experts E.
        capacity: slots per expert and group.
        groups: capacity groups of equal size that the tokens fall in, in order.

    Returns:
        bool `(N, k)`. All first choices still come before all second ones.
    """
    by_choice = (routing.experts.shape[-1], -1)
    bin_of = ops.reshape(bin_of_assignments(routing, num_experts, groups), by_choice)
    order = ops.cast(ops.argsort(-ops.stop_gradient(priority)), "int32")
    served = ops.reshape(ops.take(bin_of, order, axis=1), (-1,))
    bins = sort_into_bins(served, num_experts * groups)
    fits = ops.reshape(bins.position < capacity, by_choice)
    fits = ops.take(fits, ops.argsort(order), axis=1)
    return ops.logical_and(routing.kept, ops.transpose(fits))


def _kept_within(bins: Bins, capacity: int | Tensor, routing: Routing) -> Tensor:
    """The assignments that find a slot, bool `(N, k)`."""
    fits = ops.reshape(bins.position < capacity, (routing.experts.shape[-1], -1))
    return ops.logical_and(routing.kept, ops.transpose(fits))
