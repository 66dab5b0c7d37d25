"""Routers by name, config or object, as Keras does for `activation`."""

from typing import Any

import keras

from keras_moe import _checks
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

_ROUTERS: dict[str, type[Router]] = {
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


def get(
    router: Any,
    *,
    num_experts: int,
    top_k: int,
    balance_weight: float | None = None,
    z_loss_weight: float | None = None,
    capacity_factor: float | None = None,
    eval_capacity_factor: float | None = None,
    seed: int | None = None,
    **kwargs: Any,
) -> Router:
    """Returns a router: a named one made with the arguments, or the object or config as it is.

    Args:
        router: a name, a serialized config or a `Router`.
        num_experts: the experts to choose from; an object must agree.
        top_k: experts per token, for rules that do not fix it themselves.
        balance_weight: coefficient of the balance loss; None for the rule's own. Rules that balance
            in another way have no such loss. Defaults to `None`.
        z_loss_weight: coefficient of the router z-loss; None for the rule's own. Defaults to
            `None`.
        capacity_factor: the layer's, for rules with a capacity of their own; None for the rule's
            own. Defaults to `None`.
        eval_capacity_factor: the same at inference. Defaults to `None`.
        seed: seed of the router's noise. Defaults to `None`.
        **kwargs: passed to a named router's constructor.

    Raises:
        ValueError: on an unknown name, or an object with another number of experts.
    """
    if isinstance(router, str):
        _checks.one_of("router", router, _ROUTERS)
        if router not in _FIXED_TOP_K:
            kwargs["top_k"] = top_k
        given = {"balance_weight": balance_weight, "z_loss_weight": z_loss_weight}
        if _ROUTERS[router].has_capacity:
            given["capacity_factor"] = capacity_factor
            given["eval_capacity_factor"] = eval_capacity_factor
        kwargs |= {name: each for name, each in given.items() if each is not None}
        return _ROUTERS[router](num_experts, seed=seed, **kwargs)
    if isinstance(router, dict):
        router = keras.saving.deserialize_keras_object(router)
    if not isinstance(router, Router):
        _checks.fail(f"`router` must be one of {sorted(_ROUTERS)} or a `Router`.", router=router)
    if router.num_experts != num_experts:
        _checks.fail(
            f"`router` must choose from num_experts={num_experts} experts.",
            **{"router.num_experts": router.num_experts},
        )
    return router
