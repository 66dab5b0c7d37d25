"""Softmax top-k routing, the rule of Mixtral and most sparse Transformers."""

from typing import Any

import keras
from keras import ops

from keras_moe.routers.base import Router
from keras_moe.routers.selection import select_top_k
from keras_moe.types import Config, Tensor


@keras.saving.register_keras_serializable(package="keras_moe")
class TopKRouter(Router):
    """Each token goes to its k most probable experts.

    p = softmax(x W); experts = the k largest p; weight_j = p_j, divided by the sum of the k chosen
    where `normalize` is set. With k = 1 the weight stays p, since a renormalised top-1 weight is
    the constant 1 and the router would get no gradient from the task.

    Args:
        num_experts: Positive integer, the experts E to choose from.
        top_k: Integer between 1 and `num_experts`. Defaults to `2`.
        normalize: Whether the weights of the chosen experts sum to 1 (Mixtral); if not, they keep
            their share of the softmax over all experts (Qwen3, OLMoE). Defaults to `True`.
        **kwargs: Arguments of `Router`: `jitter`, `balance_weight`, `z_loss_weight`,
            `kernel_initializer`, `kernel_regularizer`, `kernel_constraint`, `seed`.

    Example:

    >>> import keras_moe
    >>> layer = keras_moe.layers.MoE(
    ...     8, 64, router=keras_moe.routers.TopKRouter(8, top_k=2, normalize=False)
    ... )

    Reference:
        Jiang et al. 2024, "Mixtral of Experts", section 2.1.
    """

    def __init__(
        self, num_experts: int, top_k: int = 2, *, normalize: bool = True, **kwargs: Any
    ) -> None:
        super().__init__(num_experts, top_k, **kwargs)
        self.normalize = bool(normalize)

    def choose(self, logits: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        experts = select_top_k(logits, self.top_k)
        weights = ops.take_along_axis(probabilities, experts, axis=-1)
        if self.normalize and self.top_k > 1:
            weights = weights / ops.sum(weights, axis=-1, keepdims=True)
        return experts, weights

    def get_config(self) -> Config:
        return {**super().get_config(), "normalize": self.normalize}
