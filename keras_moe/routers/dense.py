"""The dense gate: every expert takes part in every token."""

from typing import Any, ClassVar

import keras

from keras_moe.core.types import Config, Tensor
from keras_moe.routers.base import LinearRouter, refuse_top_k
from keras_moe.routers.selection import all_experts


@keras.saving.register_keras_serializable(package="keras_moe")
class DenseRouter(LinearRouter):
    """Sends every token to all experts, weighted by softmax(x W): the mixture of 1991.

    Not Soft MoE (Puigcerver et al. 2023): here no token is mixed with another. All loads are equal
    by construction, so there is no balance loss.

    Args:
        num_experts: Positive integer, the number of experts E.
        **kwargs: Arguments of `LinearRouter`: `losses`, `jitter`, `use_bias`, `global_balance`,
            `kernel_initializer`, `kernel_regularizer`, `kernel_constraint`, `seed`.

    Reference:
        Jacobs et al. 1991, "Adaptive Mixtures of Local Experts", equation 1.
    """

    LOSSES: ClassVar[dict[str, float]] = {
        "z_loss": 0.001,
        "local_entropy": 0.0,
        "global_entropy": 0.0,
    }

    chooses_all = True
    fixes_top_k = True

    def __init__(self, num_experts: int, **kwargs: Any) -> None:
        refuse_top_k(type(self), kwargs)
        super().__init__(num_experts, num_experts, **kwargs)

    def choose(self, logits: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        return all_experts(logits), probabilities

    def get_config(self) -> Config:
        config = super().get_config()
        del config["top_k"]
        return config
