"""Which carrier `dispatch="auto"` takes, and why."""

from typing import Any, NamedTuple

import keras

from keras_moe import _checks
from keras_moe.dispatch.blocks import BlocksCarrier, blocks_needed
from keras_moe.dispatch.capacity import CapacityCarrier
from keras_moe.dispatch.carrier import Carrier
from keras_moe.dispatch.dense import DenseCarrier

CARRIERS: dict[str, type[Carrier]] = {
    carrier.name: carrier for carrier in (CapacityCarrier, BlocksCarrier, DenseCarrier)
}

# Above this share of chosen experts the all-experts matmul wastes at most a third of its FLOPs,
# less than sorting and padding cost.
_MOSTLY_CHOSEN = 0.75


class DispatchPlan(NamedTuple):
    """How a layer would carry a number of tokens.

    Attributes:
        carrier: the carrier's name.
        overhead: predicted expert rows over the k N rows that routing asks for, at the worst
            routing; 1.0 is the limit.
        reason: why this carrier, in one sentence.
    """

    carrier: str
    overhead: float
    reason: str


def get(dispatch: Any, *, num_experts: int, top_k: int, has_capacity: bool) -> Carrier:
    """Returns the carrier for `dispatch`, a name, a config or a carrier; "auto" chooses.

    Raises:
        ValueError: on an unknown name, or where capacity and carrier contradict each other.
    """
    if dispatch == "auto":
        return _choose(num_experts, top_k, has_capacity)
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
    carrier: Carrier, dispatch: Any, num_tokens: int, num_experts: int, top_k: int, rows: int
) -> DispatchPlan:
    """Describes the work of `carrier` on `num_tokens`; `rows` is the capacity's E C, if any."""
    assignments = max(num_tokens * top_k, 1)
    if isinstance(carrier, BlocksCarrier):
        block_size = int(carrier.rows_per_block(num_tokens * top_k, num_experts))
        rows = block_size * int(blocks_needed(num_tokens * top_k, num_experts, block_size))
        reason = f"dropless, each expert padded to blocks of {block_size} rows"
    elif isinstance(carrier, DenseCarrier):
        rows = num_tokens * num_experts
        reason = f"{top_k} of {num_experts} experts are chosen: all of them in one matmul"
    else:
        reason = f"a capacity is set: {rows} slots in all"
    if dispatch != "auto":
        reason = f"asked for; {reason}"
    return DispatchPlan(carrier.name, rows / assignments, reason)


def _choose(num_experts: int, top_k: int, has_capacity: bool) -> Carrier:
    if has_capacity:
        return CapacityCarrier()
    if top_k >= _MOSTLY_CHOSEN * num_experts:
        return DenseCarrier()
    return BlocksCarrier()
