"""The contract of dispatchers, and what they share."""

from typing import Any, Protocol

from keras import ops

from keras_moe.core.exporting import is_exporting
from keras_moe.core.records import Routing
from keras_moe.core.sizes import as_tensor, at_least
from keras_moe.core.types import Config, Size, Tensor
from keras_moe.dispatch.layout import Bins, Rows
from keras_moe.dispatch.plan import sort_into_bins


class ExpertBank(Protocol):
    """Bank of experts, as dispatchers call it: `(E, C, d) -> (E, C, out)`, or blocks of one each.

    Attributes:
        num_experts: the number of experts E.
        takes_dynamic_blocks: whether the rows per block may be unknown in a TensorFlow graph.
        takes_rows: whether it takes `rows`, tokens and who goes where; False if missing.
        built: whether it has its weights.
    """

    num_experts: int
    built: bool
    takes_dynamic_blocks: bool

    def count_params(self) -> int:
        """Number of weights of all experts together, as Keras layers tell."""

    def __call__(
        self,
        inputs: Tensor,
        *,
        block_experts: Tensor | None = None,
        rows: Rows | None = None,
        training: bool | None = None,
    ) -> Tensor:
        """Applies the experts.

        Args:
            inputs: `(E, C, d)` or `(1, C, d)`; `(G, B, d)` with `block_experts`; `(N, d)` with
                `rows`.
            block_experts: the expert of each block, int32 `(G,)`.
            rows: who goes where. The outputs are then the tokens' weighted sums, `(N, out)`.
            training: whether dropout is on.
        """
        ...


class Placement(Protocol):
    """Places of the assignments: integers, and nothing that has a gradient.

    Attributes:
        kept: bool `(N, k)`, False for padding and for what was dropped.
    """

    @property
    def kept(self) -> Tensor: ...


class Dispatcher:
    """Moves tokens to their experts and back, and weighs what comes back.

    `place` says who goes where, and `run` does it. Values and gradients equal the plain sum over
    the kept assignments, weight times expert(token); sums are taken in float32 at least.
    """

    name: str
    needs_capacity = False

    def place(
        self, routing: Routing, num_experts: int, capacity: Size | None = None, groups: Size = 1
    ) -> Any:
        """Places the assignments.

        Args:
            routing: the record of a router, `(N, k)`.
            num_experts: the experts E.
            capacity: slots per expert and group, or None to keep all.
            groups: capacity groups of equal size that the tokens fall in, in order.

        Returns:
            A `Placement`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `place`.")

    def run(
        self,
        tokens: Tensor,
        weights: Tensor,
        placement: Any,
        experts: ExpertBank,
        training: bool | None = None,
    ) -> Tensor:
        """Applies the experts.

        Args:
            tokens: `(N, d)`.
            weights: float32 `(N, k)`, the weight of each assignment.
            placement: what `place` returned.
            experts: the bank.
            training: passed to the experts.

        Returns:
            The weighted sums `(N, out)`, in the tokens' dtype.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `run`.")

    def get_config(self) -> Config:
        return {}

    @classmethod
    def from_config(cls, config: Config) -> "Dispatcher":
        return cls(**config)


def needed(capacity: Size | None, name: str) -> Size:
    """The capacity of a dispatcher that works with slots alone."""
    if capacity is None:
        raise ValueError(f"`dispatch={name!r}` needs a `capacity_factor`. Received: None")
    return capacity


def takes_rows(experts: ExpertBank) -> bool:
    """Whether the experts walk over rows themselves, in a loop that no export can hold."""
    return bool(getattr(experts, "takes_rows", False)) and not is_exporting()


def bin_of_assignments(routing: Routing, num_experts: int, groups: Size = 1) -> Tensor:
    """The bin of each assignment, choice-major `(k N,)`: expert-major, then by group."""
    count = ops.shape(routing.experts)[0]
    bins = routing.experts
    if not (isinstance(groups, int) and groups == 1):
        group = ops.arange(count, dtype="int32") // at_least(count // at_least(groups, 1), 1)
        bins = bins * groups + ops.expand_dims(group, -1)
    nowhere = num_experts * groups
    if not isinstance(nowhere, int):
        nowhere = as_tensor(nowhere, "int32")
    bins = ops.where(routing.kept, bins, nowhere)
    return ops.reshape(ops.transpose(bins), (-1,))


def bins_of(routing: Routing, num_experts: int, groups: Size = 1) -> Bins:
    """The assignments sorted by expert, then by group."""
    return sort_into_bins(bin_of_assignments(routing, num_experts, groups), num_experts * groups)


def kept_within(routing: Routing, num_experts: int, capacity: Size | None, groups: Size) -> Tensor:
    """The assignments that find a slot, bool `(N, k)`: all of them without a capacity."""
    if capacity is None:
        return routing.kept
    fits = bins_of(routing, num_experts, groups).position < capacity
    fits = ops.reshape(fits, (routing.experts.shape[-1], -1))
    return ops.logical_and(routing.kept, ops.transpose(fits))


def kept_best_first(routing: Routing, num_experts: int, capacity: Size, groups: Size = 1) -> Tensor:
    """The assignments that find a slot where tokens of larger first weight are served first.

    Args:
        routing: the record of a router, `(N, k)`; of equal weights, the earlier token's is first.
        num_experts: the number of experts E.
        capacity: slots per expert and group.
        groups: capacity groups of equal size that the tokens fall in, in order.

    Returns:
        bool `(N, k)`. All first choices still come before all second ones.
    """
    by_choice = (routing.experts.shape[-1], -1)
    bin_of = ops.reshape(bin_of_assignments(routing, num_experts, groups), by_choice)
    order = ops.cast(ops.argsort(-ops.stop_gradient(routing.weights[:, 0])), "int32")
    served = ops.reshape(ops.take(bin_of, order, axis=1), (-1,))
    bins = sort_into_bins(served, num_experts * groups)
    fits = ops.reshape(bins.position < capacity, by_choice)
    fits = ops.take(fits, ops.argsort(order), axis=1)
    return ops.logical_and(routing.kept, ops.transpose(fits))
