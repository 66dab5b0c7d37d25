"""The dense gate: every expert takes part in every token."""

from typing import Any

import keras

from keras_moe.routers.base import Router
from keras_moe.routers.selection import all_experts
from keras_moe.types import Config, Tensor


@keras.saving.register_keras_serializable(package="keras_moe")
class DenseRouter(Router):
    """Every token goes to all experts, weighted by softmax(x W): the mixture of 1991.

    Not Soft MoE (Puigcerver et al. 2023): here no token is mixed with another. All loads are equal
    by construction, so there is no balance loss.

    Args:
        num_experts: Positive integer, the number of experts E.
        **kwargs: Arguments of `Router`: `jitter`, `z_loss_weight`, `local_entropy_weight`,
            `global_entropy_weight`, `kernel_initializer`, `kernel_regularizer`,
            `kernel_constraint`, `seed`.

    Reference:
        Jacobs et al. 1991, "Adaptive Mixtures of Local Experts", equation 1.
    """

    def __init__(self, num_experts: int, **kwargs: Any) -> None:
        kwargs["balance_weight"] = kwargs["sequence_balance_weight"] = 0.0
        super().__init__(num_experts, num_experts, **kwargs)

    def choose(self, logits: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        return all_experts(logits), probabilities

    def get_config(self) -> Config:
        config = super().get_config()
        del config["top_k"], config["balance_weight"], config["sequence_balance_weight"]
        return config
