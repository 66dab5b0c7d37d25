"""The contract of carriers."""

from collections.abc import Callable
from typing import Protocol

import keras
from keras import ops

from keras_moe._sizes import as_tensor, at_least
from keras_moe.dispatch.layout import Stage
from keras_moe.routing import Routing
from keras_moe.types import Config, Tensor


class ExpertBank(Protocol):
    """What a carrier needs of experts: `(E, C, d) -> (E, C, out)`, or blocks of one expert each.

    Attributes:
        num_experts: the number of experts E.
        takes_dynamic_blocks: whether the rows per block may be unknown in a TensorFlow graph.
        takes_groups: whether it can be run by its layers, with `grouped`; False if missing.
    """

    num_experts: int
    takes_dynamic_blocks: bool

    def count_params(self) -> int:
        """How many weights all experts have together, as Keras layers tell."""

    def __call__(
        self,
        inputs: Tensor,
        *,
        block_experts: Tensor | None = None,
        grouped: Callable[[Tensor, Callable[[int | Tensor], list[Stage]]], Tensor] | None = None,
        training: bool | None = None,
    ) -> Tensor:
        """Applies the experts.

        Args:
            inputs: `(E, C, d)` or `(1, C, d)`; `(G, B, d)` with `block_experts`; `(N, d)` with
                `grouped`.
            block_experts: the expert of each block, int32 `(G,)`.
            grouped: called with the inputs and a function that gives the bank's layers for a number
                of rows; returns the outputs.
            training: whether dropout is on.
        """
        ...


class Carrier:
    """Moves tokens to their experts and back, and weighs what comes back.

    Values and gradients equal the plain sum over the kept assignments, weight times expert(token);
    sums are taken in float32 at least. Only a carrier with a capacity may drop assignments.
    """

    name: str
    has_capacity = False

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
        """Applies the chosen experts.

        Args:
            tokens: `(N, d)`.
            routing: the record of a router, `(N, k)`.
            experts: the bank.
            capacity: slots per expert and group, for carriers that have a capacity.
            groups: capacity groups of equal size that the tokens fall in, in order.
            training: passed to the experts.

        Returns:
            The weighted sum `(N, out)` in the tokens' dtype, and the kept assignments, bool
            `(N, k)`.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `__call__`.")

    def get_config(self) -> Config:
        return {}

    @classmethod
    def from_config(cls, config: Config) -> "Carrier":
        return cls(**config)


def bin_of_assignments(routing: Routing, num_experts: int, groups: int | Tensor = 1) -> Tensor:
    """The bin of each assignment, choice-major `(k N,)`: expert-major, then by group."""
    count = ops.shape(routing.experts)[0]
    bins = routing.experts
    if not (isinstance(groups, int) and groups == 1):
        group = ops.arange(count, dtype="int32") // at_least(count // at_least(groups, 1), 1)
        bins = bins * groups + ops.expand_dims(group, -1)
    nowhere = as_tensor(num_experts * groups, "int32")
    bins = ops.where(routing.kept, bins, nowhere)
    return ops.reshape(ops.transpose(bins), (-1,))


def weighted_sum(values: Tensor, weights: Tensor, dtype: str) -> Tensor:
    """Sums `(k, N, out)` with weights `(k, N)` over k, in float32 at least."""
    wide = keras.backend.result_type(dtype, "float32")
    terms = ops.cast(values, wide) * ops.expand_dims(ops.cast(weights, wide), -1)
    return ops.cast(ops.sum(terms, axis=0), dtype)
