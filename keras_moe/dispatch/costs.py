"""Predicted costs of dispatchers, in rows that the experts compute in the same time."""

from typing import NamedTuple

import keras

from keras_moe.core.types import Size


class Platform(NamedTuple):
    """Costs of one expert besides its rows, in rows it could compute in the same time.

    Attributes:
        read: of reading an expert's weights from memory, which few rows wait for.
        copy: of copying an expert's weights, where a walk has to.
        waste: rows of the last block that are not the expert's own, on average, where it has many.
        start: of sorting and of setting up a walk, once.
        lookup: of gathering experts' weights, times the rows squared: such copies leave the caches.
        dispatch: of sorting and gathering, per row.
    """

    read: float
    copy: float
    waste: float
    start: float
    lookup: float
    dispatch: float


# Set to fit ratios measured on 2 CPU cores in float32, with no GPU: docs/design/0010.
_PLATFORMS = {
    "jax": Platform(read=25.0, copy=25.0, waste=16.0, start=0.0, lookup=4.0, dispatch=0.1),
    "tensorflow": Platform(read=25.0, copy=4.0, waste=0.0, start=60.0, lookup=4.0, dispatch=0.1),
    "torch": Platform(read=25.0, copy=0.0, waste=0.0, start=70.0, lookup=4.0, dispatch=0.1),
}
# Portable Keras code: gathered weights, about four blocks of each expert.
_PORTABLE = Platform(read=25.0, copy=160.0, waste=16.0, start=0.0, lookup=4.0, dispatch=0.1)
# Slots per assignment from which on a walk over kept rows beats one batched matmul of all slots.
_WALK_FROM = {"jax": 1.3, "tensorflow": 1.5, "torch": 0.0}
# Multiply-adds of an expert from which on it does so even where no slot is empty: on XLA:CPU a
# batched matmul takes 1.1 to 1.4 times a plain one, and a step of the walk must be worth its start.
_LARGE = {"jax": 1e8}
_TILE = 64  # rows per tile of a grouped matmul kernel; half of one is wasted per expert


def least_cost(num_tokens: int, num_experts: int, top_k: int) -> float:
    """Least cost of any dispatcher: k N rows, and one reading of the experts in use."""
    read = _PLATFORMS.get(keras.backend.backend(), _PORTABLE).read
    return num_tokens * top_k + read * _expected_busy(num_tokens, num_experts, top_k)


def dropless_costs(
    num_tokens: int,
    num_experts: int,
    top_k: int,
    *,
    training: bool,
    is_bank: bool,
    grouped: bool,
    share: float = 1.0,
) -> dict[str, float]:
    """Predicted cost of each dropless dispatcher.

    Args:
        num_tokens: the tokens N of one call.
        num_experts: the experts E.
        top_k: the experts per token k.
        training: whether gradients are taken; `lookup` would keep a copy of the weights per row.
        is_bank: whether the experts are a bank that shows its layers.
        grouped: whether there is a good native grouped matmul.
        share: of the assignments, those that go to these experts; others go to other devices'.
    """
    platform = _PLATFORMS.get(keras.backend.backend(), _PORTABLE) if is_bank else _PORTABLE
    rows, busy = num_tokens * top_k * share, _expected_busy(num_tokens, num_experts, top_k * share)
    waste = min(platform.waste, rows / busy)
    costs = {
        "walk" if is_bank else "padded_blocks": platform.start
        + rows * (1 + platform.dispatch)
        + busy * (platform.read + platform.copy + waste),
        "dense": num_experts * (num_tokens + platform.read),
    }
    if grouped and is_bank:
        # A walk is a loop with a matmul per step: what an accelerator is worst at.
        del costs["walk"]
        costs["grouped"] = rows * (1 + platform.dispatch) + busy * (platform.read + _TILE / 2)
    if is_bank and not training:
        all_rows = num_tokens * top_k
        costs["lookup"] = all_rows * (1 + platform.read + platform.lookup * all_rows)
    return costs


def walk_beats_slots(assigned: Size, slots: Size, num_experts: int, weights: int) -> bool:
    """Whether, on a CPU, a walk over what is kept costs less than all slots at once.

    Args:
        assigned: the k N assignments.
        slots: the E C slots. Where either is unknown, many assignments fill them.
        num_experts: the experts E.
        weights: of all of them.
    """
    least = _WALK_FROM.get(keras.backend.backend(), float("inf"))
    large = _LARGE.get(keras.backend.backend(), float("inf"))
    if isinstance(assigned, int) and isinstance(slots, int):
        multiply_adds = min(assigned, slots) / num_experts * weights / num_experts
        return slots >= least * assigned or multiply_adds >= large
    return least <= 1.0


def _expected_busy(num_tokens: int, num_experts: int, top_k: float) -> float:
    """Experts that at least one token chooses, where all choices are as likely."""
    return num_experts * (1 - (1 - min(top_k / num_experts, 1.0)) ** num_tokens)
