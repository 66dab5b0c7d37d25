"""Routers by name, config or object, as Keras does for `activation`."""

from typing import Any

import keras

from keras_moe import _checks
from keras_moe.routers.base import Router
from keras_moe.routers.dense import DenseRouter
from keras_moe.routers.switch import SwitchRouter
from keras_moe.routers.top_k import TopKRouter

_ROUTERS: dict[str, type[Router]] = {
    "dense": DenseRouter,
    "switch": SwitchRouter,
    "top_k": TopKRouter,
}
_FIXED_TOP_K = {"dense", "switch"}


def get(
    router: Any,
    *,
    num_experts: int,
    top_k: int,
    balance_weight: float,
    z_loss_weight: float,
    seed: int | None = None,
    **kwargs: Any,
) -> Router:
    """Returns a router: a named one made with the arguments, or the object or config as it is.

    Args:
        router: a name ("top_k", "switch", "dense"), a serialized config or a `Router`.
        num_experts: the experts to choose from; an object must agree.
        top_k: experts per token, for rules that do not fix it themselves.
        balance_weight: coefficient of the balance loss.
        z_loss_weight: coefficient of the router z-loss.
        seed: seed of the router's noise. Defaults to `None`.
        **kwargs: passed to a named router's constructor.

    Raises:
        ValueError: on an unknown name, or an object with another number of experts.
    """
    if isinstance(router, str):
        _checks.one_of("router", router, _ROUTERS)
        if router not in _FIXED_TOP_K:
            kwargs["top_k"] = top_k
        return _ROUTERS[router](
            num_experts,
            balance_weight=balance_weight,
            z_loss_weight=z_loss_weight,
            seed=seed,
            **kwargs,
        )
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
