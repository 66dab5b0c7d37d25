"""Which carrier a layer takes, and why."""

from typing import Any, NamedTuple

import keras

from keras_moe import _checks
from keras_moe.dispatch.auto import DROPLESS, AutoCarrier
from keras_moe.dispatch.capacity import CapacityCarrier
from keras_moe.dispatch.carrier import Carrier
from keras_moe.dispatch.costs import least_cost
from keras_moe.dispatch.einsum import EinsumCarrier
from keras_moe.dispatch.expert_choice import ExpertChoiceCarrier

CARRIERS: dict[str, type[Carrier]] = {
    **DROPLESS,
    **{carrier.name: carrier for carrier in (CapacityCarrier, EinsumCarrier)},
}

_WHY = {
    "blocks": "dropless: each expert walks over its own rows",
    "grouped": "dropless, with the platform's own grouped matmul",
    "lookup": "few tokens: the weights are taken to them",
    "dense": "all experts on all tokens in one matmul",
    "capacity": "a capacity is set: {rows:.0f} slots in all",
    "expert_choice": "experts choose their tokens: {rows:.0f} slots in all",
    "einsum": "a capacity is set: {rows:.0f} slots in all, and a mask of tokens x slots",
}


class DispatchPlan(NamedTuple):
    """How a layer would carry a number of tokens.

    Attributes:
        carrier: the carrier's name.
        overhead: predicted time over that of a dense layer of the same active FLOPs (with few
            tokens: of reading the weights in use once); 1.0 is the limit. With a capacity, slots
            over the k N assignments, which is the most: on a CPU empty ones may be left out.
        reason: why this carrier, in one sentence.
    """

    carrier: str
    overhead: float
    reason: str


def get(dispatch: Any, *, has_capacity: bool, chooses_tokens: bool = False) -> Carrier:
    """Returns the carrier for `dispatch`, a name, a config or a carrier; "auto" chooses.

    Args:
        dispatch: the layer's argument.
        has_capacity: whether there is a capacity factor.
        chooses_tokens: whether experts choose tokens, which one carrier does.

    Raises:
        ValueError: on an unknown name, or where capacity and carrier contradict each other.
    """
    if chooses_tokens:
        if dispatch != "auto":
            _checks.fail(
                "`dispatch` must be 'auto' where experts choose their tokens.", dispatch=dispatch
            )
        return ExpertChoiceCarrier()
    if dispatch == "auto":
        return CapacityCarrier() if has_capacity else AutoCarrier()
    if isinstance(dispatch, str):
        _checks.one_of("dispatch", dispatch, ["auto", *CARRIERS])
        carrier = CARRIERS[dispatch]()
    elif isinstance(dispatch, dict):
        carrier = keras.saving.deserialize_keras_object(dispatch)
    else:
        carrier = dispatch
    if not isinstance(carrier, Carrier):
        _checks.fail(
            f"`dispatch` must be one of {sorted(['auto', *CARRIERS])} or a `Carrier`.",
            dispatch=dispatch,
        )
    if carrier.has_capacity and not has_capacity:
        _checks.fail(
            f"`dispatch={carrier.name!r}` needs a `capacity_factor`.", capacity_factor=None
        )
    if has_capacity and not carrier.has_capacity:
        _checks.fail(
            f"`dispatch={carrier.name!r}` drops nothing, so `capacity_factor` must be None.",
            dispatch=carrier.name,
        )
    return carrier


def plan(
    carrier: Carrier,
    num_tokens: int,
    num_experts: int,
    top_k: int,
    *,
    slots: int,
    is_bank: bool,
    dtype: str,
    training: bool,
) -> DispatchPlan:
    """Describes what `carrier` does with `num_tokens`; `slots` is the capacity's E C, or 0."""
    name = carrier.name
    if carrier.has_capacity:
        cost, least = float(slots), float(num_tokens * top_k)
    else:
        costs = AutoCarrier.costs(
            num_tokens, num_experts, top_k, is_bank=is_bank, dtype=dtype, training=training
        )
        if isinstance(carrier, AutoCarrier):
            name = min(costs, key=lambda each: costs[each])
        cost = costs.get(name, float("nan"))
        least = least_cost(num_tokens, num_experts, top_k)
    reason = _WHY.get(name, "a carrier of yours").format(rows=cost)
    if not isinstance(carrier, AutoCarrier | CapacityCarrier | ExpertChoiceCarrier):
        reason = f"asked for; {reason}"
    return DispatchPlan(name, cost / least, reason)
