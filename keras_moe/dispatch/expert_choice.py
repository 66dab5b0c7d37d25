"""Experts choose their tokens: a fixed number of slots, each filled with the best that is left."""

from typing import NamedTuple

import keras
from keras import ops

from keras_moe.core.numerics import LOWEST
from keras_moe.core.records import Routing
from keras_moe.core.types import Config, Size, Tensor
from keras_moe.dispatch import backend
from keras_moe.dispatch.dispatcher import Dispatcher, ExpertBank, needed
from keras_moe.dispatch.layout import wide_dtype


class ChosenPlacement(NamedTuple):
    """The tokens that each expert chose.

    Attributes:
        kept: bool `(N, E)`.
        source: int32 `(E, groups * C)`, the token in each slot; 0 in an empty one.
        is_filled: bool `(E, groups * C)`.
    """

    kept: Tensor
    source: Tensor
    is_filled: Tensor


@keras.saving.register_keras_serializable(package="keras_moe")
class ExpertChoiceDispatcher(Dispatcher):
    """Gives every expert the C tokens that weigh it most, of each group: E C rows.

    It takes the record of a router that rates all experts, `(N, E)`. A token may be chosen by any
    number of experts, and adds exactly 0 where by none; padding fills no slot. Tokens come back by
    a sum over segments, whose order on a GPU is the platform's.

    Args:
        weighs_inputs: Whether weights multiply what experts read, and not what they give. Defaults
            to `False`.
    """

    name = "expert_choice"
    needs_capacity = True

    def __init__(self, weighs_inputs: bool = False) -> None:
        self.weighs_inputs = bool(weighs_inputs)

    def place(
        self, routing: Routing, num_experts: int, capacity: Size | None = None, groups: Size = 1
    ) -> ChosenPlacement:
        capacity = needed(capacity, self.name)
        count = ops.shape(routing.weights)[0]
        if isinstance(count, int) and count == 0:
            none = ops.zeros((num_experts, 0), dtype="int32")
            return ChosenPlacement(routing.kept, none, ops.cast(none, "bool"))
        chosen, is_filled = _choose(routing, num_experts, capacity, groups)
        source = ops.where(is_filled, chosen, 0)
        return ChosenPlacement(_as_mask(source, is_filled, count), source, is_filled)

    def run(
        self,
        tokens: Tensor,
        weights: Tensor,
        placement: ChosenPlacement,
        experts: ExpertBank,
        training: bool | None = None,
    ) -> Tensor:
        _, source, is_filled = placement
        num_experts, (count, width) = experts.num_experts, ops.shape(tokens)
        if isinstance(count, int) and count == 0:
            empty = experts(ops.zeros((num_experts, 0, width), dtype=tokens.dtype))
            return ops.reshape(empty, (0, empty.shape[-1]))
        rows = ops.take(tokens, ops.reshape(source, (-1,)), axis=0)
        rows = ops.reshape(rows, (num_experts, ops.shape(source)[1], width))
        weights = ops.take_along_axis(ops.transpose(weights), source, axis=1)
        if self.weighs_inputs:
            rows = _weighed(rows, weights)
        outputs = experts(rows, training=training)
        # An empty slot holds some token; where that gives NaN, 0 times it would too.
        sums = ops.where(is_filled[..., None], ops.cast(outputs, wide_dtype(outputs)), 0.0)
        if not self.weighs_inputs:
            sums = _weighed(sums, weights)
        sums = ops.reshape(sums, (-1, outputs.shape[-1]))
        sums = backend.current.segment_sum(sums, ops.reshape(source, (-1,)), num_segments=count)
        return ops.cast(sums, outputs.dtype)

    def get_config(self) -> Config:
        return {"weighs_inputs": self.weighs_inputs}


def _weighed(rows: Tensor, weights: Tensor) -> Tensor:
    """Rows `(E, C, width)` times their weights `(E, C)`, in their dtype, from float32 at least."""
    wide = wide_dtype(rows)
    return ops.cast(ops.cast(rows, wide) * ops.cast(weights[..., None], wide), rows.dtype)


def _choose(
    routing: Routing, num_experts: int, capacity: Size, groups: Size
) -> tuple[Tensor, Tensor]:
    """Each expert's tokens `(E, groups * C)`, best first in a group, and which slots are filled."""
    is_open = ops.logical_and(routing.kept, ops.isfinite(routing.weights))
    scores = ops.where(is_open, ops.stop_gradient(routing.weights), LOWEST)
    scores = ops.reshape(ops.transpose(scores), (num_experts, groups, -1))
    # A sort, since `ops.top_k` breaks ties as it likes on torch.
    place = ops.cast(ops.argsort(-scores, axis=-1), "int32")[..., :capacity]
    is_filled = ops.take_along_axis(scores, place, axis=-1) > LOWEST
    size = ops.shape(scores)[-1]
    first = ops.expand_dims(ops.arange(groups, dtype="int32") * size, -1)
    shape = (num_experts, groups * capacity)
    return ops.reshape(place + first, shape), ops.reshape(is_filled, shape)


def _as_mask(source: Tensor, is_filled: Tensor, count: Size) -> Tensor:
    """Mask of the experts that chose a token, bool `(N, E)`."""
    num_experts = source.shape[0]
    place = source + ops.expand_dims(ops.arange(num_experts, dtype="int32") * count, -1)
    times = backend.current.segment_sum(
        ops.reshape(ops.cast(is_filled, "int32"), (-1,)),
        ops.reshape(place, (-1,)),
        num_segments=num_experts * count,
    )
    return ops.transpose(ops.reshape(times, (num_experts, count)) > 0)
