"""Balanced assignment by Sinkhorn's algorithm."""

from typing import Any, ClassVar

import keras
from keras import ops

from keras_moe.core import checks
from keras_moe.core.numerics import softmax
from keras_moe.core.types import Config, Tensor
from keras_moe.routers.base import Decision, LinearRouter
from keras_moe.routers.selection import pick, select_top_k

_TINY = 1e-20


@keras.saving.register_keras_serializable(package="keras_moe")
class SinkhornRouter(LinearRouter):
    """Chooses by scores that are balanced over the batch in training; plain top-k at inference.

    In training exp(x W) is scaled by a factor per token and one per expert until each token's
    row sums to 1 / N and each expert's column to 1 / E, and a token goes to the k largest of its
    row. No gradient flows through the scaling. The weights are those of the plain scores:
    sigmoid(x W) with k = 1, the softmax over all experts, not renormalised, with more. At
    inference, where no token may depend on others, the k largest x W are chosen.

    Args:
        num_experts: Positive integer, the number of experts E.
        top_k: Integer between 1 and `num_experts`. Defaults to `1` (the papers').
        iterations: Positive integer, how often both factors are computed. Defaults to `8`.
        **kwargs: Arguments of `LinearRouter`: `losses`, `jitter`, `use_bias`, `global_balance`,
            `kernel_initializer`, `kernel_regularizer`, `kernel_constraint`, `seed`. The `losses`
            are 0 by default: the assignment is balanced.

    Reference:
        Clark et al. 2022, "Unified Scaling Laws for Routed Language Models", section 3.1 and
        appendix B.2.1 (S-BASE); Lewis et al. 2021, "BASE Layers", which solves the assignment
        exactly.
    """

    LOSSES: ClassVar[dict[str, float]] = {
        "z_loss": 0.0,
        "sequence_balance": 0.0,
        "first_choice_balance": 0.0,
        "local_entropy": 0.0,
        "global_entropy": 0.0,
    }

    def __init__(
        self,
        num_experts: int,
        top_k: int = 1,
        *,
        iterations: int = 8,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, top_k, **kwargs)
        self.iterations = checks.positive_int("iterations", iterations)

    def looks_ahead(self, has_capacity: bool) -> str | None:
        return "`SinkhornRouter` balances over all tokens in training"

    def decide(
        self, inputs: Tensor, mask: Tensor | None, training: bool | None, **more: Any
    ) -> Decision:
        logits = self.logits(inputs, **more)
        scores = self._balanced(logits, mask) if training else logits
        experts = select_top_k(scores, self.top_k)
        probabilities = self.probabilities(logits)
        values = ops.sigmoid(logits) if self.largest_top_k == 1 else probabilities
        weights = pick(values, experts)
        return Decision(experts, weights, logits, probabilities)

    def _balanced(self, logits: Tensor, mask: Tensor | None) -> Tensor:
        """The scaled scores, `(N, E)`; 0 for padding, which takes no share of an expert."""
        logits = ops.stop_gradient(logits)
        # -inf rules an expert out; a row with NaN or Inf, or without a finite score, is no token.
        is_finite = ops.isfinite(logits)
        is_token = ops.logical_and(
            ops.any(is_finite, axis=-1, keepdims=True),
            ops.all(ops.logical_or(is_finite, logits < 0), axis=-1, keepdims=True),
        )
        if mask is not None:
            is_token = ops.logical_and(is_token, ops.expand_dims(mask, -1))
        # A factor per row is free, so a softmax, which does not overflow, serves as exp.
        scores = softmax(ops.where(is_token, logits, 0.0))
        scores = ops.where(is_token, scores, 0.0)
        count = ops.maximum(ops.sum(ops.cast(is_token, "float32")), 1.0)
        by_expert = by_token = 1.0
        for _ in range(self.iterations):
            rows = ops.sum(scores * by_expert, axis=-1, keepdims=True)
            by_token = 1.0 / (count * ops.maximum(rows, _TINY))
            columns = ops.sum(ops.where(is_token, scores * by_token, 0.0), axis=0, keepdims=True)
            by_expert = 1.0 / (self.num_experts * ops.maximum(columns, _TINY))
        return ops.where(is_token, scores * by_token * by_expert, 0.0)

    def get_config(self) -> Config:
        return {**super().get_config(), "iterations": self.iterations}
