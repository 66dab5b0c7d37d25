"""Noisy top-k gating, the rule of the first sparse mixture."""

from typing import Any, ClassVar

import keras
from keras import ops

from keras_moe.core.initializers import FiniteInitializer
from keras_moe.core.numerics import normal_cdf, softmax
from keras_moe.core.types import InitializerLike, Shape, Tensor
from keras_moe.routers.base import Decision
from keras_moe.routers.noisy import NoisyRouter
from keras_moe.routers.selection import pick, select_top_k, spread

_FAR = 1e4
_LEAST_NOISE = 1e-2  # as in the authors' tensor2tensor: a width of 0 would be divided by


@keras.saving.register_keras_serializable(package="keras_moe")
class NoisyTopKRouter(NoisyRouter):
    """Sends each token to k experts, chosen in training under noise whose width is learned.

    h_i = (x W)_i + N(0, 1) * std_i, std_i = softplus((x W_noise)_i) + 0.01; experts = the k largest
    h; weights = softmax of these k. Without training there is no noise, h = x W. With k = 1, where
    that softmax is the constant 1, the weight is the expert's share of a softmax over all.

    The importance loss is the CV^2 of each expert's summed weights, the load loss that of its
    chances to be chosen if its own noise was drawn again,
    P_i = Phi(((x W)_i - t_i) / std_i), t_i the k-th largest of the other experts' h.
    `"sequence_importance"` and `"sequence_load"` are those of each sequence, and their mean.

    Args:
        num_experts: Positive integer, the experts E to choose from.
        top_k: Integer between 1 and `num_experts`. Defaults to `2`.
        kernel_initializer: Initializer of both kernels. Defaults to `"zeros"`, so that noise alone
            decides at first (the paper's).
        **kwargs: Arguments of `LinearRouter`: `losses`, `jitter`, `use_bias`, `global_balance`,
            `kernel_regularizer`, `kernel_constraint`, `seed`. In `losses`, `"importance"` and
            `"load"` are 0.1 by default (the paper's; without a load loss where k is E), the others
            0.

    Reference:
        Shazeer et al. 2017, "Outrageously Large Neural Networks", section 2.1 and appendix A.
    """

    LOSSES: ClassVar[dict[str, float]] = {
        "z_loss": 0.0,
        "sequence_balance": 0.0,
        "first_choice_balance": 0.0,
        "local_entropy": 0.0,
        "global_entropy": 0.0,
        "importance": 0.1,
        "load": 0.1,
        "sequence_importance": 0.0,
        "sequence_load": 0.0,
    }

    def __init__(
        self,
        num_experts: int,
        top_k: int = 2,
        *,
        kernel_initializer: InitializerLike = "zeros",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, top_k, kernel_initializer=kernel_initializer, **kwargs)

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        self.noise_kernel = self.add_weight(
            name="noise_kernel",
            shape=tuple(self.kernel.shape),
            initializer=FiniteInitializer(self.kernel_initializer, "router/noise_kernel"),
            regularizer=self.kernel_regularizer,
            constraint=self.kernel_constraint,
        )

    def decide(
        self, inputs: Tensor, mask: Tensor | None, training: bool | None, **more: Any
    ) -> Decision:
        clean = self.logits(inputs, **more)
        std = ops.softplus(ops.matmul(inputs, self.noise_kernel)) + _LEAST_NOISE
        noisy = clean
        if training:
            noisy = self._noisy(clean, std)
        ranked = select_top_k(noisy, min(self.top_k + 1, self.num_experts))
        experts = ranked[:, : self.top_k]
        values = pick(noisy, ranked)
        if self.largest_top_k > 1:
            weights = softmax(values[:, : self.top_k])
        else:
            weights = pick(softmax(noisy), experts)
        gates = spread(weights, experts, self.num_experts)
        return Decision(
            experts,
            weights,
            clean,
            self.probabilities(clean),
            amounts={
                "importance": gates,
                "load": self._chances(clean, std, values, experts),
            },
        )

    def _chances(
        self, clean: Tensor, std: Tensor, values: Tensor, experts: Tensor
    ) -> Tensor | None:
        """P, `(N, E)`; `values (N, k + 1)` are the largest noisy logits, largest first."""
        if self.top_k == self.num_experts:  # all are chosen, whatever the noise
            return None
        ones = ops.ones_like(experts, dtype="float32")
        is_chosen = spread(ones, experts, self.num_experts) > 0
        # Without a chosen expert, the k-th largest of the rest is the one after the k.
        threshold = ops.where(is_chosen, values[:, self.top_k :], values[:, self.top_k - 1, None])
        gap = clean - threshold
        # An expert that is ruled out, by -inf, has no chance, and a gradient that is finite.
        gap = ops.where(ops.isfinite(gap), gap, ops.where(gap < 0, -_FAR, gap))
        return normal_cdf(gap / std)
