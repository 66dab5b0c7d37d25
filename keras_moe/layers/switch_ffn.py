"""The feed-forward layer of the Switch Transformer."""

from typing import Any

import keras

from keras_moe.core import checks
from keras_moe.core.types import Activation, Config
from keras_moe.layers.moe import MoE
from keras_moe.layers.sublayers import name_or_default
from keras_moe.routers.switch import SwitchRouter


@keras.saving.register_keras_serializable(package="keras_moe")
class SwitchFFN(MoE):
    """`MoE` with the Switch paper's settings: top-1, jitter, capacity, balance loss, ReLU.

    y[n] = p[n,e] * expert_e(x[n]), e = argmax_e p[n,e], or exactly 0 where expert e is full.

    Args:
        num_experts: Positive integer, the number of experts E.
        hidden_dim: Positive integer, the hidden width h of each expert. Only `None` where `experts`
            are Keras layers. Defaults to `None`.
        capacity_factor: Slots per expert over N / E in training; None drops nothing, or leaves it
            to `capacity`. Defaults to `1.25`.
        eval_capacity_factor: The same at inference; unused where `capacity_factor` is None.
            Defaults to `2.0`.
        jitter: Half-width of the multiplicative noise on the router's input in training. Defaults
            to `0.01`.
        balance_weight: Coefficient of the balance loss. Defaults to `0.01`.
        z_loss_weight: Coefficient of the router z-loss, which ST-MoE added later. Defaults to
            `0.0`.
        activation: Activation of the experts' hidden layer. Defaults to `"relu"`.
        seed: Optional integer, seed of dropout and jitter. Defaults to `None`.
        **kwargs: The other arguments of `MoE`, except `top_k` and `router`.

    Example:

    >>> import numpy as np
    >>> from keras_moe import layers
    >>> layer = layers.SwitchFFN(num_experts=8, hidden_dim=64)
    >>> tuple(layer(np.zeros((4, 10, 16), "float32")).shape)
    (4, 10, 16)

    Reference:
        Fedus et al. 2021, "Switch Transformers", section 2 and table 9.
    """

    _rule = SwitchRouter
    takes_router = False

    def __init__(
        self,
        num_experts: int,
        hidden_dim: int | None = None,
        *,
        capacity_factor: float | None = 1.25,
        eval_capacity_factor: float | None = 2.0,
        jitter: float = 0.01,
        balance_weight: float = 0.01,
        z_loss_weight: float = 0.0,
        activation: Activation = "relu",
        seed: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        for argument in ("top_k", "router"):
            if argument in kwargs:
                checks.fail(
                    f"`SwitchFFN` sets `{argument}` itself; use `MoE` to choose it.",
                    **{argument: kwargs[argument]},
                )
        router = SwitchRouter(
            num_experts,
            jitter=jitter,
            losses={"balance": balance_weight, "z_loss": z_loss_weight},
            seed=seed,
            name="router",
        )
        super().__init__(
            num_experts,
            hidden_dim,
            router=router,
            capacity_factor=capacity_factor,
            eval_capacity_factor=None if capacity_factor is None else eval_capacity_factor,
            activation=activation,
            seed=seed,
            name=name_or_default(name, "switch_ffn"),
            **kwargs,
        )
        self.jitter = router.jitter

    def get_config(self) -> Config:
        config = super().get_config()
        del config["top_k"], config["router"]
        losses = self.router.loss_weights
        return {
            **config,
            "balance_weight": losses["balance"],
            "z_loss_weight": losses["z_loss"],
            "jitter": self.jitter,
        }
