"""Summary of each mixture layer, in numbers and words."""

import math
from dataclasses import dataclass

import keras

from keras_moe.flops.active_parameters import active_parameters
from keras_moe.inspection.alarms import alarms
from keras_moe.inspection.health import Counts, health
from keras_moe.inspection.layer_numbers import has_capacity
from keras_moe.inspection.ranges import Range, ranges_of
from keras_moe.reporting.last_epoch import LastEpoch

HEALTHY = "No alarm."
UNJUDGED = "Too few tokens to judge: chance alone leaves experts out."

# The numbers of `health`, and what they say.
MEANINGS = {
    "load_cv": "spread of the experts' load over its mean; 0 is perfect balance, sqrt(E - 1) one "
    "expert for all",
    "importance_cv": "spread of the experts' combine or gate weights over its mean",
    "dropped": "share of the assignments that found no room",
    "entropy": "of the router in nats; 0 is sure, log(E) undecided",
    "max_violation": "how much more than the mean the most loaded expert has, in means",
    "used_experts": "exp(entropy of the load): how many experts of equal use it is",
    "dead_experts": "experts with less than 1 % of their share",
    "effective_experts": "exp(entropy): between how many experts the router wavers",
    "confidence": "mean of the router's largest probability",
    "least_share": "what the expert with the least gets, over its fair share; of several tasks, "
    "from the one that takes most of it",
    "batch_cv": "spread of the load over its mean within a batch, the mean over batches",
    "worst_batch_cv": "the same of the worst batch",
    "worst_dropped": "share dropped in the worst batch",
    "aux_loss": "what the router's losses, times their coefficients, add to the model's per batch",
    "combine_min": "combine weight of the least used slot, over the mean slot's",
    "combine_max": "combine weight of the most used slot, over the mean slot's",
    "dispatch_min": "weight in all slots of the least dispatched token, over the mean token's",
    "dispatch_max": "weight in all slots of the most dispatched token, over the mean token's",
}


@dataclass(frozen=True)
class State:
    """How a layer does, on the data or in training.

    Attributes:
        place: where in training that was; "" for the data.
        numbers: the layer's `health`.
        ranges: the healthy ranges of its numbers.
        alarms: what is wrong, and what to try; or that nothing is.
        is_well: whether there is no alarm.
        is_judged: whether enough was counted for alarms.
    """

    place: str
    numbers: dict[str, float]
    ranges: dict[str, Range]
    alarms: tuple[str, ...]
    is_well: bool
    is_judged: bool


@dataclass(frozen=True)
class Summary:
    """One mixture layer.

    Attributes:
        name: its name in the model, unique.
        layer: the layer.
        kind: its class.
        experts: how many there are, and how many of them a token takes, in words.
        parameters: of the layer.
        active: those of them that one token meets.
        counts: what it counted on the data.
        states: how it does on the data, and in the last epoch of a history.
    """

    name: str
    layer: keras.layers.Layer
    kind: str
    experts: str
    parameters: int
    active: int
    counts: Counts
    states: tuple[State, ...]


def summarize(
    name: str, layer: keras.layers.Layer, counts: Counts, last: LastEpoch | None
) -> Summary:
    """Summarizes a layer, its counts, and those of its last epoch of training, if there are any."""
    states = [_state("", layer, counts)]
    if last is not None and name in last.counts:
        place = f"in training, epoch {last.epoch + 1}"
        states.append(_state(place, layer, last.counts[name]))
    return Summary(
        name=name,
        layer=layer,
        kind=type(layer).__name__,
        experts=_experts_of(layer),
        parameters=all_parameters(layer),
        active=active_parameters(layer),
        counts=counts,
        states=tuple(states),
    )


def _state(place: str, layer: keras.layers.Layer, counts: Counts) -> State:
    messages = tuple(alarm.message for alarm in alarms(layer, counts, training=bool(place)))
    ranges = ranges_of(layer, counts)
    return State(
        place=place,
        numbers=health(counts, has_capacity(layer)),
        ranges=ranges,
        alarms=messages or (HEALTHY if ranges else UNJUDGED,),
        is_well=not messages,
        is_judged=bool(ranges),
    )


def all_parameters(layer: keras.layers.Layer) -> int:
    """The number of parameters of all experts, counted as `active_parameters` does."""
    parts = layer._flatten_layers()
    weights = {id(weight): weight for part in parts for weight in part._trainable_variables}
    return sum(math.prod(weight.shape) for weight in weights.values())


def _experts_of(layer: keras.layers.Layer) -> str:
    count = layer.num_experts
    if hasattr(layer, "slots_per_expert"):
        return f"{count}, of {layer.slots_per_expert} slots"
    if hasattr(layer, "num_tasks"):
        return f"{count}, for {layer.num_tasks} tasks"
    return f"{layer.router.experts_per_token:g} of {count}"
