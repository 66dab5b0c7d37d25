"""Choice of a dispatcher: one decision, for a call and for `dispatch_plan`."""

import functools
from typing import Any, NamedTuple

import keras

from keras_moe.core import checks
from keras_moe.core.types import Config, Size, Tensor
from keras_moe.dispatch import backend, native
from keras_moe.dispatch.costs import dropless_costs, least_cost, walk_beats_slots
from keras_moe.dispatch.dense import DenseDispatcher
from keras_moe.dispatch.dispatcher import Dispatcher, ExpertBank, takes_rows
from keras_moe.dispatch.einsum import EinsumDispatcher
from keras_moe.dispatch.expert_choice import ExpertChoiceDispatcher
from keras_moe.dispatch.grouped import GroupedDispatcher
from keras_moe.dispatch.lookup import LookupDispatcher
from keras_moe.dispatch.padded_blocks import PaddedBlocksDispatcher, is_for_export
from keras_moe.dispatch.slots import SlotsDispatcher
from keras_moe.dispatch.walk import WalkDispatcher
from keras_moe.dispatch.weighed_inputs import WeighedInputs

DISPATCHERS: dict[str, type[Dispatcher]] = {
    dispatcher.name: dispatcher
    for dispatcher in (
        DenseDispatcher,
        EinsumDispatcher,
        GroupedDispatcher,
        LookupDispatcher,
        PaddedBlocksDispatcher,
        SlotsDispatcher,
        WalkDispatcher,
    )
}
_MANY = 1 << 16  # tokens, where a graph is traced for any number: as in training

_WHY = {
    "walk": "dropless: each expert walks over its own rows",
    "padded_blocks": "dropless, in whole blocks of rows of one expert",
    "grouped": "dropless, with the platform's own grouped matmul",
    "lookup": "few tokens: the weights are taken to them",
    "dense": "all experts on all tokens in one matmul",
    "slots": "a capacity is set: {slots:.0f} slots in all",
    "expert_choice": "experts choose their tokens: {slots:.0f} slots in all",
    "einsum": "a capacity is set: {slots:.0f} slots in all, and a mask of tokens x slots",
}
_OF_SLOTS = ("slots", "einsum", "expert_choice", "walk")  # at most what the slots hold
_WALK_AT_CAPACITY = "a capacity is set: each expert walks over the rows it keeps"


class DispatchPlan(NamedTuple):
    """Plan of how a layer would run a number of tokens.

    Attributes:
        dispatcher: the dispatcher's name.
        overhead: predicted time over that of a dense layer of the same active FLOPs (with few
            tokens: of reading the weights in use once); 1.0 is the limit. With a capacity, slots
            over the k N assignments, which is the most.
        reason: why this dispatcher, in one sentence.
    """

    dispatcher: str
    overhead: float
    reason: str


class Sizes(NamedTuple):
    """Sizes that a choice depends on.

    Attributes:
        tokens: the tokens N of the call; a tensor or None where unknown.
        top_k: experts per token k that the record names.
        slots: all slots E C of all groups, or None without a capacity.
        dtype: of the tokens.
        training: whether gradients are taken.
        like: a tensor on the device that the call runs on.
        weighs_inputs: whether weights multiply what experts read.
        share: of the assignments, those that go to the experts of this device.
    """

    tokens: Size | None
    top_k: int
    slots: Size | None
    dtype: str
    training: bool
    like: Tensor
    weighs_inputs: bool = False
    share: float = 1.0

    def of_rows(self) -> "Sizes":
        """The sizes that a dispatcher sees: weighed tokens are as many as the assignments."""
        if not self.weighs_inputs:
            return self
        tokens = None if self.tokens is None else self.tokens * self.top_k
        return self._replace(tokens=tokens, top_k=1)


def get(
    dispatch: Dispatcher | str | Config, *, has_capacity: bool, chooses_tokens: bool = False
) -> Dispatcher | None:
    """Returns the dispatcher for `dispatch`, a name, a config or an object; None for "auto".

    Args:
        dispatch: the layer's argument.
        has_capacity: whether there is a capacity factor.
        chooses_tokens: whether experts choose tokens, which one dispatcher does.

    Raises:
        ValueError: on an unknown name, or a dispatcher that lacks a capacity.
    """
    if chooses_tokens:
        if dispatch != "auto":
            checks.fail(
                "`dispatch` must be 'auto' where experts choose their tokens.", dispatch=dispatch
            )
        return ExpertChoiceDispatcher()
    if dispatch == "auto":
        return None
    if isinstance(dispatch, str):
        checks.one_of("dispatch", dispatch, ["auto", *DISPATCHERS])
        dispatcher: Any = DISPATCHERS[dispatch]()
    elif isinstance(dispatch, dict):
        dispatcher = keras.saving.deserialize_keras_object(dispatch)
    else:
        dispatcher = dispatch
    if not isinstance(dispatcher, Dispatcher):
        checks.fail(
            f"`dispatch` must be one of {sorted(['auto', *DISPATCHERS])} or a `Dispatcher`.",
            dispatch=dispatch,
        )
    if dispatcher.needs_capacity and not has_capacity:
        checks.fail(
            f"`dispatch={dispatcher.name!r}` needs a `capacity_factor`.", capacity_factor=None
        )
    return dispatcher


def choose(asked: Dispatcher | None, experts: ExpertBank, sizes: Sizes) -> Dispatcher:
    """The dispatcher that a call takes.

    Args:
        asked: the one that the layer was given, or None to choose.
        experts: the bank.
        sizes: of the call.
    """
    if isinstance(asked, ExpertChoiceDispatcher):
        return ExpertChoiceDispatcher(sizes.weighs_inputs)
    if sizes.weighs_inputs:
        return WeighedInputs(_choose(asked, experts, sizes.of_rows()))
    return _choose(asked, experts, sizes)


def _choose(asked: Dispatcher | None, experts: ExpertBank, sizes: Sizes) -> Dispatcher:
    dispatcher, is_bank = asked, takes_rows(experts)
    if dispatcher is None and sizes.slots is not None:
        dispatcher = DISPATCHERS[_best_at_capacity(experts, is_bank, sizes)]()
    elif dispatcher is None:
        count = sizes.tokens if isinstance(sizes.tokens, int) else None
        costs = _costs(experts.num_experts, is_bank, sizes._replace(tokens=count, like=None))
        dispatcher = DISPATCHERS[min(costs, key=costs.__getitem__)]()
    return _possible(dispatcher, experts, is_bank, sizes)


def plan(asked: Dispatcher | None, experts: ExpertBank, sizes: Sizes) -> DispatchPlan:
    """Describes what `choose` takes for a known number of tokens."""
    taken, sizes = choose(asked, experts, sizes), sizes.of_rows()
    tokens, slots = int(sizes.tokens), sizes.slots  # type: ignore[arg-type]
    if slots is not None and taken.name in _OF_SLOTS:
        overhead = float(slots) / (tokens * sizes.top_k)
    else:
        is_bank = takes_rows(experts)
        costs = _costs(experts.num_experts, is_bank, sizes._replace(like=None))
        cost = costs.get(taken.name, float("nan"))
        overhead = cost / least_cost(tokens, experts.num_experts, sizes.top_k)
    reason = _WHY.get(taken.name, "a dispatcher of yours").format(slots=slots or 0)
    if slots is not None and taken.name == "walk":
        reason = _WALK_AT_CAPACITY
    if asked is not None and not isinstance(asked, ExpertChoiceDispatcher):
        reason = f"asked for; {reason}"
    return DispatchPlan(taken.name, overhead, reason)


def _best_at_capacity(experts: ExpertBank, is_bank: bool, sizes: Sizes) -> str:
    """Slots, or on a CPU a walk over what is kept, where that costs less."""
    tokens, slots = sizes.tokens, sizes.slots
    if slots is None or not is_bank or not backend.current.is_on_cpu(sizes.like):
        return "slots"
    assigned = int(tokens * sizes.top_k * sizes.share) if isinstance(tokens, int) else None
    # Before a bank is built, its experts count as small ones.
    weights = experts.count_params() if experts.built else 0
    walks = walk_beats_slots(assigned, slots, experts.num_experts, weights)
    return "walk" if walks else "slots"


@functools.lru_cache(maxsize=1024)  # every eager call asks
def _costs(num_experts: int, is_bank: bool, sizes: Sizes) -> dict[str, float]:
    """Predicted cost of dropless dispatchers, in rows of the experts; see `dropless_costs`."""
    return dropless_costs(
        _MANY if sizes.tokens is None else max(int(sizes.tokens), 1),
        num_experts,
        sizes.top_k,
        training=sizes.training,
        is_bank=is_bank,
        grouped=is_bank and native.is_good(sizes.dtype, is_known=sizes.tokens is not None),
        share=sizes.share,
    )


def _possible(
    dispatcher: Dispatcher, experts: ExpertBank, is_bank: bool, sizes: Sizes
) -> Dispatcher:
    """The dispatcher, or what takes its place where experts or an export cannot do it."""
    is_static = bool(getattr(experts, "takes_dynamic_blocks", False))
    if isinstance(dispatcher, WalkDispatcher):
        if dispatcher.is_grouped and not getattr(experts, "takes_rows", False):
            checks.fail(
                "`dispatch='grouped'` needs a bank such as `ExpertMLP`, whose layers it can run.",
                experts=experts,
            )
        can_walk = dispatcher.is_grouped or backend.current.WALKS
        if is_bank and can_walk:
            return dispatcher
        dispatcher = PaddedBlocksDispatcher(has_static_blocks=not is_static)
    if isinstance(dispatcher, PaddedBlocksDispatcher) and not is_static:
        if is_for_export(0 if sizes.tokens is None else sizes.tokens):
            # Blocks of Keras layers are a loop whose steps differ, which no export can hold.
            return DenseDispatcher()
        if not dispatcher.has_static_blocks:
            return PaddedBlocksDispatcher(dispatcher.block_size, has_static_blocks=True)
    return dispatcher
