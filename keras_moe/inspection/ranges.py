"""Healthy ranges of a layer's numbers."""

import math
from typing import NamedTuple

import keras
import numpy as np

from keras_moe.inspection.health import Counts, amounts_of

ENOUGH = 20  # counts per expert: with fewer, chance alone leaves experts out
_SHARE_OF_EXPERTS = 0.5
_LEAST_SHARE = 0.1
_DROPPED = 0.1
_SURE = 0.02  # of log(E)
_EVEN = 0.999
_BUSIEST = 2.0
_POLARISED = 0.9


class Range(NamedTuple):
    """The values of a number that are healthy, both ends included.

    Attributes:
        low: the least.
        high: the largest.
        kind: of the alarm where a value lies outside.
    """

    low: float
    high: float
    kind: str

    def __contains__(self, value: object) -> bool:
        return isinstance(value, int | float) and self.low <= value <= self.high


# Where the limits come from, by number; what a page says of them.
SOURCES = {
    "load_cv": "at most 1, that of half of the experts sharing all",
    "importance_cv": "at most 1, that of half of the experts sharing all",
    "used_experts": "at least half of the experts; a rule of thumb",
    "dropped": "at most 0.1; ST-MoE (Zoph et al. 2022) fine-tunes as well with 10 to 15 % dropped",
    "entropy": "at least 2 % of log(E), a rule of thumb; for soft slots, see effective experts",
    "max_violation": "at most 2; 0.5 to 0.7 with a balance loss in Wang et al. 2024, table 2; "
    "of gates, below 0.9 of their weight on one expert",
    "dead_experts": "0",
    "effective_experts": "for soft slots at most 99.9 % of E: above it weights differ by less than "
    "5 %, and every slot is the mean token",
    "least_share": "at least 0.1; a rule of thumb",
    "batch_cv": "at most 1, beside what chance gives so few tokens",
    "combine_min": "at least 0.1; a rule of thumb",
}


def can_be_judged(counts: Counts) -> bool:
    """Whether there are several experts, and enough was counted to rule out chance."""
    amounts = amounts_of(counts)[1]
    num_experts = amounts.shape[-1]
    return bool(num_experts > 1 and amounts.sum(axis=-1).min() >= ENOUGH * num_experts)


def ranges_of(layer: keras.layers.Layer, counts: Counts) -> dict[str, Range]:
    """The healthy ranges of a layer's numbers; of none where too little was counted."""
    if not can_be_judged(counts):
        return {}
    num_experts = amounts_of(counts)[1].shape[-1]
    few = "few" if hasattr(layer, "num_tasks") else "collapse"
    ranges = {
        "used_experts": Range(_SHARE_OF_EXPERTS * num_experts, math.inf, few),
        "dead_experts": Range(0.0, 0.0, "dead"),
        "least_share": Range(_LEAST_SHARE, math.inf, "starved"),
    }
    if "load" in counts:
        ranges |= _sparse(num_experts, counts)
        if not layer.router.loss_weights:  # such as a hash, which learns nothing and is always sure
            del ranges["entropy"]
        return ranges
    ranges["importance_cv"] = Range(0.0, 1.0, few)
    if hasattr(layer, "num_tasks"):
        most = _POLARISED * num_experts - 1.0
        return ranges | {"max_violation": Range(0.0, most, "polarisation")}
    if layer.mixing == "soft":
        most = _EVEN * num_experts
        ranges["effective_experts"] = Range(0.0, most, "uniform")
        ranges["combine_min"] = Range(_LEAST_SHARE, math.inf, "starved")
    return ranges


def _sparse(num_experts: int, counts: Counts) -> dict[str, Range]:
    # The spread of tokens that go to experts by chance, the variance of a multinomial.
    assignments = float(np.sum(counts["load"])) / max(float(counts.get("batches", 1.0)), 1.0)
    chance = math.sqrt((num_experts - 1) / max(assignments, 1.0))
    # Of the worst batch there is no range: the first one of a training is often uneven.
    return {
        "load_cv": Range(0.0, 1.0, "collapse"),
        "max_violation": Range(0.0, _BUSIEST, "imbalance"),
        "batch_cv": Range(0.0, math.hypot(1.0, chance), "imbalance"),
        "entropy": Range(_SURE * math.log(num_experts), math.inf, "saturation"),
        "dropped": Range(0.0, _DROPPED, "drops"),
    }


def polarised_tasks(shares: np.ndarray) -> list[int]:
    """The tasks, rows of shares `(tasks, E)`, whose gate takes one expert alone."""
    return [task for task, row in enumerate(shares) if row.max() > _POLARISED]
