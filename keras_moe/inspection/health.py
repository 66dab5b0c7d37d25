"""Health metrics of a layer's experts, from the layer's counts."""

from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import numpy as np

from keras_moe.core.types import Array

Counts: TypeAlias = dict[str, Array]

BY_DEFAULT = ("load_cv", "importance_cv", "dropped", "entropy")
NAMES = (
    *BY_DEFAULT,
    "max_violation",
    "used_experts",
    "dead_experts",
    "effective_experts",
    "confidence",
    "least_share",
    "batch_cv",
    "worst_batch_cv",
    "worst_dropped",
    "aux_loss",
    "combine_min",
    "combine_max",
    "dispatch_min",
    "dispatch_max",
    "slot_cosine",
    "task_entropy",
    "task_gates",
)
_DEAD = 0.01  # of the mean: what an expert with less is called dead
_TINY = 1e-12
# Of counts: the largest of any batch, which are no sums, and what may be below 0.
_LARGEST = ("worst_batch_cv", "worst_dropped")
_MAY_SHRINK = (*_LARGEST, "aux_loss")


def health(
    counts: Counts, has_capacity: bool = False, wanted: Collection[str] = NAMES
) -> dict[str, float]:
    """The scalars of what a layer counted, those of `wanted` that it has and that are one number.

    Args:
        counts: what `running_counts()` gives, or the difference of two of them.
        has_capacity: whether assignments can be dropped.
        wanted: some of `NAMES`.

    Returns:
        Floats by name. For `MMoE` they are means over tasks; its dead experts are dead for all, and
        its `least_share` is of the task that takes most of that expert.
    """
    measure, amounts = amounts_of(counts)
    mean = np.maximum(amounts.mean(axis=-1), _TINY)
    decisions = max(float(counts["decisions"]), 1.0)
    entropy = np.asarray(counts["entropy"]) / decisions
    # Functions, since a look in a training loop wants three of them.
    values: dict[str, Callable[[], Any]] = {
        f"{measure}_cv": lambda: (amounts.std(axis=-1) / mean).mean(),
        "entropy": lambda: entropy.mean(),
        "max_violation": lambda: (amounts.max(axis=-1) / mean - 1.0).mean(),
        "used_experts": lambda: used_experts(amounts).mean(),
        "dead_experts": lambda: len(dead_experts(amounts)),
        "effective_experts": lambda: np.exp(entropy).mean(),
        "least_share": lambda: shares_of(amounts).max(axis=0).min() * amounts.shape[-1],
    }
    if has_capacity:
        values["dropped"] = lambda: counts["dropped"] / max(float(counts["assignments"]), 1.0)
    if "batches" in counts:
        values["batch_cv"] = lambda: counts["batch_cv"] / max(float(counts["batches"]), 1.0)
        values["aux_loss"] = lambda: counts["aux_loss"] / max(float(counts["batches"]), 1.0)
        values["worst_batch_cv"] = lambda: counts["worst_batch_cv"]
        if has_capacity:
            values["worst_dropped"] = lambda: counts["worst_dropped"]
    if "confidence" in counts:
        values["confidence"] = lambda: counts["confidence"] / decisions
    if "slot_importance" in counts:
        values |= _of_slots(counts)
    return {name: float(values[name]()) for name in NAMES if name in values and name in wanted}


def _of_slots(counts: Counts) -> dict[str, Callable[[], Any]]:
    """How unequal slots and tokens are in their use of each other; 1 is the mean."""
    slots = np.asarray(counts["slot_importance"])
    mean, sequences = max(slots.mean(), _TINY), max(float(counts["sequences"]), 1.0)
    return {
        "combine_min": lambda: slots.min() / mean,
        "combine_max": lambda: slots.max() / mean,
        "dispatch_min": lambda: counts["dispatch_min"] / sequences,
        "dispatch_max": lambda: counts["dispatch_max"] / sequences,
    }


def amounts_of(counts: Counts) -> tuple[str, Array]:
    """Returns "load" or "importance", and its values `(tasks, E)`, one row without tasks."""
    measure = "load" if "load" in counts else "importance"
    return measure, np.atleast_2d(counts[measure])


def shares_of(amounts: Array) -> Array:
    """The share of each expert, `(tasks, E)`; equal shares where nothing was counted."""
    total = amounts.sum(axis=-1, keepdims=True)
    even = np.full(amounts.shape, 1.0 / amounts.shape[-1])
    return np.where(total > 0, amounts / np.maximum(total, _TINY), even)


def used_experts(amounts: Array) -> Array:
    """exp(entropy of the experts' shares) `(tasks,)`: the number of experts in use."""
    shares = shares_of(amounts)
    return np.exp(-np.sum(shares * np.log(np.maximum(shares, _TINY)), axis=-1))


def dead_experts(amounts: Array) -> list[int]:
    """The experts that get less than 1 % of their fair share from every task."""
    shares = shares_of(amounts)
    return [int(e) for e in np.flatnonzero((shares < _DEAD / shares.shape[-1]).all(axis=0))]


def difference(now: Counts, before: Counts) -> Counts:
    """What was counted between two reads; all of `now` where counts were reset in between."""
    if have_dropped(now, before):
        return now
    return {
        name: np.asarray(value if name in _LARGEST else value - before[name])
        for name, value in now.items()
    }


def have_dropped(now: Counts, before: Counts) -> bool:
    """Whether counts, which only grow, are those of other weights, or were reset."""
    return any(bool(np.any(now[name] < before[name])) for name in now if name not in _MAY_SHRINK)
