"""Batch prioritized routing of V-MoE."""

from typing import Any, ClassVar

import keras

from keras_moe.core import checks
from keras_moe.core.numerics import normal_cdf, softmax
from keras_moe.core.types import Config, Tensor
from keras_moe.routers.base import Decision
from keras_moe.routers.noisy import NoisyRouter
from keras_moe.routers.selection import pick, select_top_k


@keras.saving.register_keras_serializable(package="keras_moe")
class BatchPriorityRouter(NoisyRouter):
    """Gives slots first to the tokens that it is surest of; top-k otherwise.

    p = softmax(x W + eps), eps ~ N(0, noise_std^2) in training, 0 otherwise; experts = the k
    largest p, weight_j = p_j, not renormalised. Where a capacity lets not all in, tokens are served
    in the order of their largest weight, first choices before second ones: with a small
    `capacity_factor` unimportant tokens are dropped, which is how V-MoE saves work at inference.
    An output then depends on the other tokens of the capacity group, later ones too.

    The importance loss is the CV^2 of the summed p of each expert (without noise), the load loss
    that of the chances to reach the k-th largest noisy logit,
    P_i = 1 - Phi((t - (x W)_i) / noise_std). `"sequence_importance"` and `"sequence_load"` are
    those of each sequence, and their mean: what the authors' code gives in groups of one sequence.

    Args:
        num_experts: Positive integer, the experts E to choose from.
        top_k: Integer between 1 and `num_experts`. Defaults to `2`.
        noise_std: Number of at least 0, the width of the noise; None for 1 / E. Defaults to `None`
            (the paper's).
        **kwargs: Arguments of `LinearRouter`: `losses`, `jitter`, `use_bias`, `global_balance`,
            `kernel_initializer`, `kernel_regularizer`, `kernel_constraint`, `seed`. In `losses`,
            `"importance"` and `"load"`, which there is only with noise, are 0.005 by default (the
            paper's), the others 0.

    Reference:
        Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts", section 2, section 4
        and appendix A; its `capacity_factor` is 1.05 in training.
    """

    LOSSES: ClassVar[dict[str, float]] = {
        "z_loss": 0.0,
        "sequence_balance": 0.0,
        "first_choice_balance": 0.0,
        "local_entropy": 0.0,
        "global_entropy": 0.0,
        "importance": 0.005,
        "load": 0.005,
        "sequence_importance": 0.0,
        "sequence_load": 0.0,
    }

    serves_best_first = True

    def __init__(
        self,
        num_experts: int,
        top_k: int = 2,
        *,
        noise_std: float | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, top_k, **kwargs)
        self.noise_std = checks.optional(checks.non_negative, "noise_std", noise_std)

    def decide(
        self, inputs: Tensor, mask: Tensor | None, training: bool | None, **more: Any
    ) -> Decision:
        clean = self.logits(inputs, **more)
        std = 1.0 / self.num_experts if self.noise_std is None else self.noise_std
        noisy = clean
        if training and std:
            noisy = self._noisy(clean, std)
        experts = select_top_k(noisy, self.top_k)
        weights = pick(softmax(noisy), experts)
        chances = None
        if std:
            threshold = pick(noisy, experts[:, -1:])
            chances = normal_cdf((clean - threshold) / std)
        probabilities = self.probabilities(clean)
        amounts = {"importance": probabilities, "load": chances}
        return Decision(experts, weights, clean, probabilities, amounts=amounts)

    def looks_ahead(self, has_capacity: bool) -> str | None:
        return "`BatchPriorityRouter` gives slots to later tokens first" if has_capacity else None

    def get_config(self) -> Config:
        return {**super().get_config(), "noise_std": self.noise_std}
