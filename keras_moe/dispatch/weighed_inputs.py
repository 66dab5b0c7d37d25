"""Weights on the input side: experts read weight * token."""

from typing import Any, NamedTuple

from keras import ops

from keras_moe.core.records import Routing
from keras_moe.core.sizes import at_least
from keras_moe.core.types import Size, Tensor
from keras_moe.dispatch.dispatcher import Dispatcher, ExpertBank
from keras_moe.dispatch.layout import wide_dtype


class WeighedPlacement(NamedTuple):
    """Assignments as tokens of their own.

    Attributes:
        kept: bool `(N, k)`.
        inner: where the dispatcher puts these k N tokens.
        groups: capacity groups.
    """

    kept: Tensor
    inner: Any
    groups: Size


class WeighedInputs(Dispatcher):
    """Lets experts read weight * token, by any dispatcher, and sums what they give as it is.

    Each assignment is a token of its own, of one choice with a weight of 1: k N rows stand in
    memory, and all experts on all tokens are k times the work.

    Args:
        dispatcher: The dispatcher that moves the rows.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher = dispatcher
        self.name = dispatcher.name

    def place(
        self, routing: Routing, num_experts: int, capacity: Size | None = None, groups: Size = 1
    ) -> WeighedPlacement:
        count, top_k = ops.shape(routing.experts)
        of_assignments = routing._replace(
            **{
                name: ops.reshape(_by_choice(getattr(routing, name), groups), (-1, 1))
                for name in ("experts", "weights", "kept", "asked")
            }
        )
        inner = self.dispatcher.place(of_assignments, num_experts, capacity, groups)
        kept = ops.reshape(inner.kept, (groups, top_k, _size(count, groups)))
        kept = ops.reshape(ops.transpose(kept, (0, 2, 1)), (count, top_k))
        return WeighedPlacement(kept, inner, groups)

    def run(
        self,
        tokens: Tensor,
        weights: Tensor,
        placement: WeighedPlacement,
        experts: ExpertBank,
        training: bool | None = None,
    ) -> Tensor:
        groups, (count, top_k) = placement.groups, ops.shape(weights)
        size, wide = _size(count, groups), wide_dtype(tokens)
        grouped = ops.reshape(ops.cast(tokens, wide), (groups, 1, size, tokens.shape[-1]))
        rows = grouped * ops.cast(_by_choice(weights, groups), wide)[..., None]
        rows = ops.cast(ops.reshape(rows, (-1, tokens.shape[-1])), tokens.dtype)
        ones = ops.ones((count * top_k, 1), dtype="float32")
        outputs = self.dispatcher.run(rows, ones, placement.inner, experts, training)
        of_choice = ops.reshape(outputs, (groups, top_k, size, outputs.shape[-1]))
        sums = ops.sum(ops.cast(of_choice, wide_dtype(outputs)), axis=1)
        return ops.cast(ops.reshape(sums, (count, outputs.shape[-1])), outputs.dtype)


def _size(count: Size, groups: Size) -> Size:
    """Tokens of a group."""
    return count // at_least(groups, 1)


def _by_choice(values: Tensor, groups: Size) -> Tensor:
    """`(N, k)` as `(groups, k, n)`: of a group, all first choices come before all second ones."""
    count, top_k = ops.shape(values)
    grouped = ops.reshape(values, (groups, _size(count, groups), top_k))
    return ops.transpose(grouped, (0, 2, 1))
