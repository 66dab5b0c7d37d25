"""The contract of carriers, and the gathering that the slot-based ones share."""

from typing import Protocol

import keras
from keras import ops

from keras_moe.dispatch.plan import Slots
from keras_moe.routing import Routing
from keras_moe.types import Config, Tensor


class ExpertBank(Protocol):
    """What a carrier needs of experts: `(E, C, d) -> (E, C, out)`, or blocks of one expert each.

    Attributes:
        num_experts: the number of experts E.
        takes_dynamic_blocks: whether the rows per block may be unknown in a TensorFlow graph.
    """

    num_experts: int
    takes_dynamic_blocks: bool

    def __call__(
        self, inputs: Tensor, *, block_experts: Tensor | None = None, training: bool | None = None
    ) -> Tensor: ...


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
        group_size = ops.maximum(count // ops.maximum(groups, 1), 1)
        group = ops.arange(count, dtype="int32") // ops.cast(group_size, "int32")
        bins = bins * groups + ops.expand_dims(group, -1)
    nowhere = ops.cast(num_experts * groups, "int32")
    bins = ops.where(routing.kept, bins, nowhere)
    return ops.reshape(ops.transpose(bins), (-1,))


def gather_tokens(tokens: Tensor, slots: Slots) -> Tensor:
    """The token in every slot, `(S, d)`.

    An empty slot holds a copy of some token that was routed, and nobody reads what comes of it. A
    row of zeros would be read by nobody either, but an expert with no gradient at zero (a norm)
    would turn the zero cotangent into NaN.
    """
    count, total = ops.shape(tokens)[0], ops.shape(slots.slot_of)[0]
    if isinstance(count, int) and count == 0:
        return ops.zeros((ops.shape(slots.assignment)[0], tokens.shape[-1]), dtype=tokens.dtype)
    filler = ops.min(slots.assignment)
    assignment = ops.where(slots.assignment < total, slots.assignment, filler)
    token = ops.mod(assignment, ops.maximum(count, 1))
    if not isinstance(count, int):  # a dynamic batch may be empty: something must be there to take
        tokens = ops.concatenate([tokens, _zero_row(tokens)], axis=0)
    return ops.take(tokens, token, axis=0)


def combine(outputs: Tensor, slots: Slots, routing: Routing) -> tuple[Tensor, Tensor]:
    """Brings the slots' outputs `(S, out)` back to their tokens and sums them, weighted.

    Returns:
        The sums `(N, out)` and the kept assignments, bool `(N, k)`.
    """
    count, top_k = ops.shape(routing.experts)
    dtype = keras.backend.standardize_dtype(outputs.dtype)
    total_slots = ops.shape(outputs)[0]
    padded = ops.concatenate([outputs, _zero_row(outputs)], axis=0)
    chosen = ops.reshape(ops.take(padded, slots.slot_of, axis=0), (top_k, count, outputs.shape[-1]))
    kept = ops.reshape(slots.slot_of < total_slots, (top_k, count))
    return weighted_sum(chosen, ops.transpose(routing.weights), dtype), ops.transpose(kept)


def weighted_sum(values: Tensor, weights: Tensor, dtype: str) -> Tensor:
    """Sums `(k, N, out)` with weights `(k, N)` over k, in float32 at least."""
    wide = keras.backend.result_type(dtype, "float32")
    terms = ops.cast(values, wide) * ops.expand_dims(ops.cast(weights, wide), -1)
    return ops.cast(ops.sum(terms, axis=0), dtype)


def _zero_row(rows: Tensor) -> Tensor:
    return ops.zeros((1, rows.shape[-1]), dtype=rows.dtype)
