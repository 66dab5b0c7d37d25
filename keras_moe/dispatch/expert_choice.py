"""Experts choose their tokens: a fixed number of slots, each filled with the best that is left."""

from typing import NamedTuple

import keras
from keras import ops

from keras_moe.core.records import Routing
from keras_moe.core.types import Size, Tensor
from keras_moe.dispatch.dispatcher import Dispatcher, ExpertBank, needed


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
    """

    name = "expert_choice"
    needs_capacity = True

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
        outputs = experts(rows, training=training)
        dtype = keras.backend.standardize_dtype(outputs.dtype)
        wide = keras.backend.result_type(dtype, "float32")
        weights = ops.take_along_axis(ops.transpose(weights), source, axis=1)
        # An empty slot holds some token; where that gives NaN, 0 times it would too.
        outputs = ops.where(is_filled[..., None], ops.cast(outputs, wide), 0.0)
        weighted = outputs * ops.cast(ops.expand_dims(weights, -1), wide)
        weighted = ops.reshape(weighted, (-1, outputs.shape[-1]))
        sums = ops.segment_sum(weighted, ops.reshape(source, (-1,)), num_segments=count)
        return ops.cast(sums, dtype)


def _choose(
    routing: Routing, num_experts: int, capacity: Size, groups: Size
) -> tuple[Tensor, Tensor]:
    """Each expert's tokens `(E, groups * C)`, best first in a group, and which slots are filled."""
    lowest = -float("inf")
    is_open = ops.logical_and(routing.kept, ops.isfinite(routing.weights))
    scores = ops.where(is_open, ops.stop_gradient(routing.weights), lowest)
    scores = ops.reshape(ops.transpose(scores), (num_experts, groups, -1))
    # A sort, since `ops.top_k` breaks ties as it likes on torch.
    place = ops.cast(ops.argsort(-scores, axis=-1), "int32")[..., :capacity]
    is_filled = ops.take_along_axis(scores, place, axis=-1) > lowest
    size = ops.shape(scores)[-1]
    first = ops.expand_dims(ops.arange(groups, dtype="int32") * size, -1)
    shape = (num_experts, groups * capacity)
    return ops.reshape(place + first, shape), ops.reshape(is_filled, shape)


def _as_mask(source: Tensor, is_filled: Tensor, count: Size) -> Tensor:
    """Mask of the experts that chose a token, bool `(N, E)`."""
    num_experts = source.shape[0]
    place = source + ops.expand_dims(ops.arange(num_experts, dtype="int32") * count, -1)
    times = ops.segment_sum(
        ops.reshape(ops.cast(is_filled, "int32"), (-1,)),
        ops.reshape(place, (-1,)),
        num_segments=num_experts * count,
    )
    return ops.transpose(ops.reshape(times, (num_experts, count)) > 0)
