"""Top-k routing, the rule of Mixtral and most sparse Transformers."""

from typing import Any

import keras
from keras import ops

from keras_moe.core import checks
from keras_moe.core.numerics import softmax
from keras_moe.core.types import Config, Tensor
from keras_moe.routers.base import LinearRouter
from keras_moe.routers.selection import pick, scaled_to_one, select_top_k

SCORES = ("softmax", "sigmoid")


@keras.saving.register_keras_serializable(package="keras_moe")
class TopKRouter(LinearRouter):
    """Sends each token to its k experts of highest score.

    s = score(x W); experts = the k largest s; weight_j = s_j, divided by the sum of the k chosen
    where `normalize` is set. A softmax over the k chosen logits, "softmax after top-k", is the same
    as a softmax over all that is normalised. With k = 1 the weight stays s, since a renormalised
    top-1 weight is the constant 1 and the router would get no gradient from the task.

    Args:
        num_experts: Positive integer, the experts E to choose from.
        top_k: Integer between 1 and `num_experts`. Defaults to `2`.
        normalize: Whether the weights of the chosen experts sum to 1 (Mixtral, Qwen3-MoE; GPT-OSS
            with `use_bias`); if not, they keep their score (Qwen2-MoE, OLMoE, V-MoE; Llama 4 with
            sigmoid and `MoE(weigh="inputs")`). Defaults to `True`.
        score: `"softmax"`, over all experts, or `"sigmoid"`, each expert's own. The balance loss
            then takes each expert's share of a token's scores. Defaults to `"softmax"`.
        **kwargs: Arguments of `LinearRouter`: `losses`, `jitter`, `use_bias`, `global_balance`,
            `kernel_initializer`, `kernel_regularizer`, `kernel_constraint`, `seed`.

    Example:

    >>> import keras_moe
    >>> layer = keras_moe.layers.MoE(
    ...     8, 64, router=keras_moe.routers.TopKRouter(8, top_k=2, normalize=False)
    ... )

    Reference:
        Jiang et al. 2024, "Mixtral of Experts", section 2.1; DeepSeek-AI 2024, "DeepSeek-V3",
        section 2.1.2 (sigmoid).
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int = 2,
        *,
        normalize: bool = True,
        score: str = "softmax",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, top_k, **kwargs)
        self.normalize = bool(normalize)
        self.score = checks.one_of("score", score, SCORES)

    def probabilities(self, logits: Tensor) -> Tensor:
        if self.score == "softmax":
            return softmax(logits)
        return scaled_to_one(ops.sigmoid(logits))

    def choose(self, logits: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        scores = probabilities if self.score == "softmax" else ops.sigmoid(logits)
        experts = select_top_k(self._ranked_by(logits, scores), self.top_k)
        return experts, self._weights(scores, experts)

    def _weights(self, scores: Tensor, experts: Tensor) -> Tensor:
        weights = pick(scores, experts)
        return scaled_to_one(weights) if self.normalize and self.largest_top_k > 1 else weights

    def _ranked_by(self, logits: Tensor, scores: Tensor) -> Tensor:
        """Numbers that the k largest are taken of: logits, since scores may round to ties."""
        return logits

    def get_config(self) -> Config:
        return {**super().get_config(), "normalize": self.normalize, "score": self.score}
