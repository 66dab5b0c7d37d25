"""Routers by name, config or object, as Keras does for `activation`."""

from typing import Any

import keras

from keras_moe.core import checks
from keras_moe.core.types import Config
from keras_moe.routers.base import Router
from keras_moe.routers.batch_priority import BatchPriorityRouter
from keras_moe.routers.dense import DenseRouter
from keras_moe.routers.dselect_k import DSelectKRouter
from keras_moe.routers.expert_choice import ExpertChoiceRouter
from keras_moe.routers.fixed import HashRouter, RandomRouter, UniformRouter
from keras_moe.routers.no_token_left import NoTokenLeftRouter
from keras_moe.routers.noisy_top_k import NoisyTopKRouter
from keras_moe.routers.relu import ReLURouter
from keras_moe.routers.sigmoid_bias import SigmoidBiasRouter
from keras_moe.routers.sinkhorn import SinkhornRouter
from keras_moe.routers.switch import SwitchRouter
from keras_moe.routers.top_k import TopKRouter

NAMED_ROUTERS: dict[str, type[Router]] = {
    "batch_priority": BatchPriorityRouter,
    "dense": DenseRouter,
    "dselect_k": DSelectKRouter,
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
    "no_token_left": NoTokenLeftRouter,
    "noisy_top_k": NoisyTopKRouter,
    "random": RandomRouter,
    "relu": ReLURouter,
    "sigmoid_bias": SigmoidBiasRouter,
    "sinkhorn": SinkhornRouter,
    "switch": SwitchRouter,
    "top_k": TopKRouter,
    "uniform": UniformRouter,
}
_FIXED_TOP_K = {"dense", "switch", "uniform"}
_DEFAULT_TOP_K = 2


def get(
    router: Router | str | Config,
    *,
    num_experts: int,
    top_k: int | None = None,
    balance_weight: float | None = None,
    z_loss_weight: float | None = None,
    capacity: int | None = None,
    capacity_factor: float | None = None,
    eval_capacity_factor: float | None = None,
    seed: int | None = None,
) -> Router:
    """Returns a router: a named one made with the arguments, or the object or config as it is.

    Args:
        router: a name, a serialized config or a `Router`.
        num_experts: the experts to choose from; an object must agree.
        top_k: experts per token; None for 2, or what the rule or the object fixes. Defaults to
            `None`.
        balance_weight: coefficient of the balance loss; None for the rule's own. Defaults to
            `None`.
        z_loss_weight: coefficient of the router z-loss; None for the rule's own. Defaults to
            `None`.
        capacity: the layer's, for named rules with a capacity of their own. Defaults to `None`.
        capacity_factor: the layer's, for the same; with neither, the rule's own. Defaults to
            `None`.
        eval_capacity_factor: the same at inference. Defaults to `None`.
        seed: seed of a named router's noise. Defaults to `None`.

    Raises:
        ValueError: on an unknown name, an object with another number of experts, or an argument
            that the router would not follow.
    """
    weights = {"balance": balance_weight, "z_loss": z_loss_weight}
    losses = {name: weight for name, weight in weights.items() if weight is not None}
    if isinstance(router, str):
        checks.one_of("router", router, NAMED_ROUTERS)
        room = {
            "capacity": capacity,
            "capacity_factor": capacity_factor,
            "eval_capacity_factor": eval_capacity_factor,
        }
        found = _named(router, num_experts, top_k, losses, room, seed)
    else:
        found = (
            keras.saving.deserialize_keras_object(router) if isinstance(router, dict) else router
        )
        if not isinstance(found, Router):
            checks.fail(
                f"`router` must be one of {sorted(NAMED_ROUTERS)} or a `Router`.", router=router
            )
        for name, weight in losses.items():
            checks.fail(
                f"`{name}_weight` must be None where `router` is an object, which brings its own: "
                f"`{type(found).__name__}(..., losses={{{name!r}: {weight}}})`.",
                **{f"{name}_weight": weight},
            )
        if found.num_experts != num_experts:
            checks.fail(
                f"`router` must choose from num_experts={num_experts} experts.",
                **{"router.num_experts": found.num_experts},
            )
    if top_k is not None and top_k not in (found.top_k, found.get_config().get("top_k")):
        checks.fail(
            f"`top_k` must be None, or what the router has: top_k={found.top_k}.", top_k=top_k
        )
    return found


def rules_with(loss: str) -> list[type[Router]]:
    """The classes of named routers that have a loss."""
    return [rule for rule in NAMED_ROUTERS.values() if loss in rule.LOSSES]


def _named(
    name: str,
    num_experts: int,
    top_k: int | None,
    losses: dict[str, float],
    room: dict[str, Any],
    seed: int | None,
) -> Router:
    """A router by its name, with those arguments that it has."""
    rule = NAMED_ROUTERS[name]
    arguments: dict[str, Any] = {}
    if name not in _FIXED_TOP_K:
        arguments["top_k"] = _DEFAULT_TOP_K if top_k is None else top_k
    if name != "uniform":
        arguments["seed"] = seed
    for loss in losses:
        if loss not in rule.LOSSES:
            checks.fail(
                f"`{loss}_weight` must be None with router={name!r}, whose losses are "
                f"{sorted(rule.LOSSES)}: give a `{rule.__name__}` with `losses=` for another.",
                **{f"{loss}_weight": losses[loss]},
            )
    if losses:
        arguments["losses"] = losses
    if rule.has_capacity and (room["capacity"] or room["capacity_factor"]):
        arguments |= room
    return rule(num_experts, **arguments)
