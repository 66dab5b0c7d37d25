"""Alarms: what is wrong with a layer's experts, and what to try."""

from collections.abc import Iterator
from typing import NamedTuple

import keras
import numpy as np

from keras_moe.core.types import Array
from keras_moe.inspection import advice
from keras_moe.inspection.health import Counts, amounts_of, dead_experts, health, shares_of
from keras_moe.inspection.layer_numbers import has_capacity, task_names
from keras_moe.inspection.ranges import polarised_tasks, ranges_of

KINDS = (
    *("dead", "collapse", "few", "starved", "imbalance"),
    *("saturation", "drops", "uniform", "polarisation"),
)


class ExpertAlarm(UserWarning):
    """Warning about a mixture whose experts are in trouble, with what to try."""


class Alarm(NamedTuple):
    """One problem of a layer.

    Attributes:
        kind: one of `KINDS`.
        message: what was seen and what to try.
    """

    kind: str
    message: str


def alarms(layer: keras.layers.Layer, counts: Counts, training: bool = True) -> Iterator[Alarm]:
    """Returns the problems of a layer, from its counts over some time, such as an epoch.

    There is at least one where a number is out of its healthy range.

    Args:
        layer: a mixture layer.
        counts: what its `running_counts()` gives, or the difference of two of them.
        training: whether they are of training; drops may have another limit at inference.
    """
    ranges = ranges_of(layer, counts)
    if not ranges:
        return
    values = health(counts, has_capacity(layer))
    out = {
        ranges[name].kind for name in values if name in ranges and values[name] not in ranges[name]
    }
    yield from _uneven(layer, counts, values, out)
    num_experts = layer.num_experts
    if "saturation" in out:
        yield Alarm(
            "saturation",
            f"The router is all but sure of every token (entropy {values['entropy']:.3f} of "
            f"{np.log(num_experts):.2f} nats): it learns little any more. "
            + advice.sentence(advice.against_sureness(layer)),
        )
    if "drops" in out:
        worst = ""
        if "worst_dropped" in values:
            worst = f", {100 * values['worst_dropped']:.0f} % in the worst batch"
        yield Alarm(
            "drops",
            f"{100 * values['dropped']:.0f} % of the assignments are dropped"
            f"{worst}. " + advice.sentence(advice.against_drops(layer, training)),
        )
    if "uniform" in out:
        yield Alarm(
            "uniform",
            f"The slots are all but uniform: a token's weights are those of "
            f"{values['effective_experts']:.3f} of {num_experts} experts, so that every expert "
            "sees the mean token. " + advice.sentence(advice.against_uniformity(layer)),
        )
    yield from _polarised(layer, amounts_of(counts)[1])


def _uneven(
    layer: keras.layers.Layer, counts: Counts, values: dict[str, float], out: set[str]
) -> Iterator[Alarm]:
    """The gravest problem of how much the experts get."""
    measure, amounts = amounts_of(counts)
    num_experts, used = amounts.shape[-1], values["used_experts"]
    try_ = advice.sentence(advice.against_imbalance(layer))
    if "dead" in out:
        dead = dead_experts(amounts)
        named = f"{dead[:8]}{' ...' * (len(dead) > 8)}"
        yield Alarm(
            "dead",
            f"{len(dead)} of {num_experts} experts get less than 1 % of their share: {named}. "
            + try_,
        )
    elif "collapse" in out:
        yield Alarm(
            "collapse",
            f"The {measure} is that of {used:.1f} experts of equal use, out of {num_experts}, and "
            f"its spread over the mean is {values[f'{measure}_cv']:.2f}. {try_}",
        )
    elif "few" in out:
        yield Alarm(
            "few", f"The gates use {used:.2f} of {num_experts} experts, the mean of tasks. {try_}"
        )
    elif "starved" in out:
        yield Alarm("starved", f"{_starved(amounts, values)} {try_}")
    elif "imbalance" in out:
        yield Alarm("imbalance", f"{_by_batch(values)} {try_}")


def _starved(amounts: Array, values: dict[str, float]) -> str:
    share, of_slot = values["least_share"], values.get("combine_min", np.inf)
    if of_slot < share:
        return f"A slot gets {100 * of_slot:.0f} % of the mean slot's weight."
    expert = shares_of(amounts).max(axis=0).argmin()
    return f"Expert {expert} gets {100 * share:.0f} % of its fair share."


def _by_batch(values: dict[str, float]) -> str:
    text = f"The busiest expert gets {1 + values['max_violation']:.1f} times its share"
    if "batch_cv" not in values:
        return f"{text}."
    return (
        f"{text}; within a batch the spread of the load over its mean is {values['batch_cv']:.2f}, "
        f"in the worst one {values['worst_batch_cv']:.2f}."
    )


def _polarised(layer: keras.layers.Layer, amounts: Array) -> Iterator[Alarm]:
    """The tasks of a multi-gate layer that read one expert alone."""
    if not hasattr(layer, "num_tasks"):
        return
    shares, names = shares_of(amounts), task_names(layer)
    polarised = [
        f"{names[task]!r} (expert {shares[task].argmax()})" for task in polarised_tasks(shares)
    ]
    if polarised:
        yield Alarm(
            "polarisation",
            f"Gates that take one expert alone: {', '.join(polarised)}. "
            + advice.sentence(advice.against_polarisation(layer)),
        )
