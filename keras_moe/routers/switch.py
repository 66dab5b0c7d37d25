"""Top-1 routing of the Switch Transformer."""

from typing import Any

import keras

from keras_moe.core.types import Config, Tensor
from keras_moe.routers.base import LinearRouter, refuse_top_k
from keras_moe.routers.selection import pick, select_top_k


@keras.saving.register_keras_serializable(package="keras_moe")
class SwitchRouter(LinearRouter):
    """Sends each token to its most probable expert, weighted by that probability.

    p = softmax((x * U(1 - jitter, 1 + jitter)) W); expert = argmax p; weight = max p. The noise is
    on in training only, and only the router sees it.

    Args:
        num_experts: Positive integer, the experts E to choose from.
        jitter: Float in [0, 1), the half-width of the multiplicative input noise. Defaults to
            `0.01` (the paper's).
        **kwargs: Arguments of `LinearRouter`: `losses`, `use_bias`, `global_balance`,
            `kernel_initializer`, `kernel_regularizer`, `kernel_constraint`, `seed`.

    Reference:
        Fedus et al. 2021, "Switch Transformers", section 2.
    """

    def __init__(self, num_experts: int, *, jitter: float = 0.01, **kwargs: Any) -> None:
        refuse_top_k(type(self), kwargs)
        super().__init__(num_experts, 1, jitter=jitter, **kwargs)

    def choose(self, logits: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        experts = select_top_k(logits, 1)
        return experts, pick(probabilities, experts)

    def get_config(self) -> Config:
        config = super().get_config()
        del config["top_k"]
        return config
