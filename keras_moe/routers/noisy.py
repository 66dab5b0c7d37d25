"""What routers share that choose under noise and balance by importance and load."""

from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe.routers.base import Router
from keras_moe.types import Config, Tensor


class NoisyRouter(Router):
    """Base of routers with normal noise on the logits, an importance and a load loss.

    Args:
        num_experts: Positive integer, the experts E to choose from.
        top_k: Integer between 1 and `num_experts`.
        importance_weight: Coefficient of the importance loss.
        load_weight: Coefficient of the load loss.
        **kwargs: Arguments of `Router`.
    """

    draws_noise = True

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        *,
        importance_weight: float,
        load_weight: float,
        **kwargs: Any,
    ) -> None:
        kwargs["balance_weight"] = 0.0  # importance and load do that
        super().__init__(num_experts, top_k, **kwargs)
        self.importance_weight = _checks.non_negative("importance_weight", importance_weight)
        self.load_weight = _checks.non_negative("load_weight", load_weight)

    @property
    def loss_weights(self) -> dict[str, float]:
        return {
            **super().loss_weights,
            "importance": self.importance_weight,
            "load": self.load_weight,
        }

    def _noisy(self, logits: Tensor, std: Tensor | float) -> Tensor:
        noise = keras.random.normal(ops.shape(logits), dtype="float32", seed=self.seed_generator)
        return logits + noise * std

    def get_config(self) -> Config:
        config = super().get_config()
        del config["balance_weight"]
        return {
            **config,
            "importance_weight": self.importance_weight,
            "load_weight": self.load_weight,
        }
