"""Dropless dispatch without padding: one expert's assignments right behind another's."""

from collections.abc import Callable, Sequence

from keras import ops

from keras_moe._exporting import is_exporting
from keras_moe.dispatch.carrier import ExpertBank, bin_of_assignments
from keras_moe.dispatch.layout import Slots, Stage
from keras_moe.dispatch.permute import combine, gather_tokens
from keras_moe.dispatch.plan import ragged_slots, sort_into_bins
from keras_moe.routing import Routing
from keras_moe.types import Tensor

Walk = Callable[[Tensor, Tensor, Sequence[Stage], int | Tensor], Tensor]
Carry = Callable[[Tensor, Tensor, Slots, Tensor, Sequence[Stage]], Tensor]


def takes_groups(experts: ExpertBank) -> bool:
    """Whether the experts are a bank that shows its layers, to a loop that no export can hold."""
    return bool(getattr(experts, "takes_groups", False)) and not is_exporting()


def carry_ragged(
    tokens: Tensor,
    routing: Routing,
    experts: ExpertBank,
    carry: Carry,
    padding: int,
    training: bool | None,
) -> tuple[Tensor, Tensor]:
    """Sorts the assignments and applies the experts.

    Args:
        tokens: `(N, d)`.
        routing: the record of a router, `(N, k)`.
        experts: a bank that `takes_groups`.
        carry: `carry(tokens, weights, slots, ends, stages)` gives the weighted sums `(N, out)`,
            where `ends (E,)` says where each expert's slots end.
        padding: empty slots that `carry` needs behind the last one.
        training: passed to the experts.

    Returns:
        The weighted sums `(N, out)` and the kept assignments, bool `(N, k)`.
    """
    bins = sort_into_bins(bin_of_assignments(routing, experts.num_experts), experts.num_experts)
    slots = ragged_slots(bins, padding)
    count = ops.shape(slots.assignment)[0]

    def grouped(tokens: Tensor, stages_of: Callable[[int | Tensor], list[Stage]]) -> Tensor:
        return carry(tokens, routing.weights, slots, bins.ends, stages_of(count))

    outputs = experts(tokens, grouped=grouped, training=training)
    kept = ops.reshape(slots.slot_of < count, (routing.experts.shape[-1], -1))
    return outputs, ops.transpose(kept)


def by_rows(walk: Walk) -> Carry:
    """Makes a `carry` of `walk(rows, ends, stages, k N)`: gather all rows, walk, combine."""

    def carry(
        tokens: Tensor, weights: Tensor, slots: Slots, ends: Tensor, stages: Sequence[Stage]
    ) -> Tensor:
        rows = gather_tokens(tokens, slots, weights.shape[-1])
        outputs = walk(rows, ends, stages, ops.shape(slots.slot_of)[0])
        return combine(outputs, slots, weights)[0]

    return carry
