"""Alarms: what is wrong with a layer's experts, and what to try."""

from collections.abc import Iterator
from typing import NamedTuple

import keras
import numpy as np

from keras_moe.core.types import Array
from keras_moe.inspection.health import Counts, amounts_of, dead_experts, health, shares_of
from keras_moe.inspection.layer_numbers import has_capacity, task_names

_ENOUGH = 20  # counts per expert: with fewer, chance alone leaves experts out
_LEAST_USED = 0.5  # of the experts
_SURE = 0.02  # of log(E)
_DROPPED = 0.1
_POLARISED = 0.9


class ExpertAlarm(UserWarning):
    """Warning about a mixture whose experts are in trouble, with what to try."""


class Alarm(NamedTuple):
    """One problem of a layer.

    Attributes:
        kind: "dead", "collapse", "saturation", "drops" or "polarisation".
        message: what was seen and what to try.
    """

    kind: str
    message: str


def can_be_judged(amounts: Array) -> bool:
    """Whether there are several experts, and enough was counted to rule out chance."""
    num_experts = amounts.shape[-1]
    return bool(num_experts > 1 and amounts.sum(axis=-1).min() >= _ENOUGH * num_experts)


def alarms(layer: keras.layers.Layer, counts: Counts) -> Iterator[Alarm]:
    """Returns the problems of a layer, from its counts over some time, such as an epoch."""
    measure, amounts = amounts_of(counts)
    num_experts = amounts.shape[-1]
    if not can_be_judged(amounts):
        return
    values = health(counts, has_capacity(layer))
    balances = "a larger `balance_weight`, or `router='sigmoid_bias'`"
    if dead := dead_experts(amounts):
        named = f"{dead[:8]}{' ...' * (len(dead) > 8)}"
        remedies = ["fewer experts"]
        if measure == "load":
            remedies = [balances, "a lower learning rate", "or fewer experts"]
        elif hasattr(layer, "num_tasks"):
            remedies = ["`gate_dropout=0.1`", "or fewer experts"]
        yield Alarm(
            "dead",
            f"{len(dead)} of {num_experts} experts get less than 1 % of their share: {named}. Try "
            f"{', '.join(remedies)}.",
        )
    elif measure == "load" and values["used_experts"] < _LEAST_USED * num_experts:
        yield Alarm(
            "collapse",
            f"The load is that of {values['used_experts']:.1f} experts of equal use, out of "
            f"{num_experts}. Try {balances}, or a lower learning rate.",
        )
    if measure == "load" and values["entropy"] < _SURE * np.log(num_experts):
        yield Alarm(
            "saturation",
            f"The router is all but sure of every token (entropy {values['entropy']:.3f} of "
            f"{np.log(num_experts):.2f} nats): it learns little any more. Try a larger "
            "`z_loss_weight`, `jitter`, or a lower learning rate.",
        )
    if values.get("dropped", 0.0) > _DROPPED:
        yield Alarm(
            "drops",
            f"{100 * values['dropped']:.0f} % of the assignments are dropped. Try a larger "
            f"`{_limit(layer)}`, `{_limit(layer)}=None`, or {balances}.",
        )
    yield from _polarised(layer, amounts)


def _limit(layer: keras.layers.Layer) -> str:
    """The argument that limits what an expert takes."""
    return "capacity_factor" if layer.capacity is None else "capacity"


def _polarised(layer: keras.layers.Layer, amounts: Array) -> Iterator[Alarm]:
    """The tasks of a multi-gate layer that read one expert alone."""
    if len(amounts) == 1:
        return
    shares = shares_of(amounts)
    names = task_names(layer)
    polarised = [
        f"{names[task]!r} (expert {row.argmax()})"
        for task, row in enumerate(shares)
        if row.max() > _POLARISED
    ]
    if polarised:
        yield Alarm(
            "polarisation",
            f"Gates that take one expert alone: {', '.join(polarised)}. Try `gate_dropout=0.1`, or "
            "a lower learning rate of the gates.",
        )
