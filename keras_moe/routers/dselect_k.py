"""DSelect-k: a differentiable choice of k experts by binary codes."""

import math
from typing import Any, ClassVar

import keras
import numpy as np
from keras import ops

from keras_moe.core import checks
from keras_moe.core.initializers import FiniteInitializer
from keras_moe.core.numerics import entropy_of, softmax
from keras_moe.core.types import Config, InitializerLike, Shape, Tensor
from keras_moe.routers.base import Decision, LinearRouter
from keras_moe.routers.losses import masked_sum, token_count
from keras_moe.routers.selection import all_experts

_TINY = 1e-20


@keras.saving.register_keras_serializable(package="keras_moe")
class DSelectKRouter(LinearRouter):
    """Lets k selectors find one expert each by a smooth binary code.

    With E experts a selector has m = ceil(log2 E) numbers z; S(z) is 0 below -gamma / 2, 1 above
    gamma / 2 and a cubic between. It gives expert e the share r_e = product over the bits of e's
    code of S(z_b) for a 1 and 1 - S(z_b) for a 0. weights_e = sum_j softmax(alpha)_j r_{j,e}. Where
    training has driven all S to 0 or 1, exactly k experts (or fewer, where selectors agree) are
    left. z and alpha are linear in the token, or with `static` the same for all tokens. As in the
    authors' code, a code's first bit is its highest. Other scores override `selectors`, not
    `logits`: those of the record are the logarithms of the weights.

    The entropy loss, the mean over tokens of -sum_j sum_e r_{j,e} ln r_{j,e}, drives them there.
    Where E is no power of 2, codes past E stand for no expert and enter neither weights nor
    entropy; "unused" keeps selectors off them: the mean of sum_j 1 / sum_e r_{j,e}.

    Shapes are static, so all experts are computed, at their weights.

    Args:
        num_experts: Positive integer, the number of experts E.
        top_k: Integer between 1 and `num_experts`, the number of selectors k. Defaults to `2`.
        static: Whether all tokens go to the same experts, as for a gate per task. Defaults to
            `False`.
        gamma: Positive number, the width of S. Defaults to `1.0` (the authors').
        kernel_initializer: Initializer of z and its kernel. Defaults to `None`, uniform within
            gamma / 100 of 0 (the authors').
        **kwargs: Arguments of `LinearRouter`: `losses`, `jitter`, `use_bias` (of z and alpha; not
            where they are static), `global_balance` (not True: it has no balance loss),
            `kernel_regularizer`, `kernel_constraint`, `seed`. In `losses`, `"entropy"` is 1e-6 by
            default; the paper tunes it.

    Reference:
        Hazimeh et al. 2021, "DSelect-k: Differentiable Selection in the Mixture of Experts",
        sections 3 and 4.
    """

    LOSSES: ClassVar[dict[str, float]] = {
        "local_entropy": 0.0,
        "global_entropy": 0.0,
        "entropy": 1e-6,
    }

    fixes_top_k = True

    def __init__(
        self,
        num_experts: int,
        top_k: int = 2,
        *,
        static: bool = False,
        gamma: float = 1.0,
        kernel_initializer: InitializerLike = None,
        **kwargs: Any,
    ) -> None:
        gamma = checks.positive("gamma", gamma)
        if kernel_initializer is None:
            near = gamma / 100.0
            kernel_initializer = keras.initializers.RandomUniform(-near, near)
        super().__init__(num_experts, num_experts, kernel_initializer=kernel_initializer, **kwargs)
        self.num_selectors = checks.int_between(
            "top_k", checks.positive_int("top_k", top_k), 1, self.num_experts, "num_experts"
        )
        self.static = bool(static)
        if self.static and self.use_bias:
            checks.fail(
                "`use_bias` must be False where `static` is set: z and alpha are biases then.",
                use_bias=self.use_bias,
            )
        if type(self).logits is not LinearRouter.logits:
            checks.fail(
                "A subclass of `DSelectKRouter` must override `selectors` in place of `logits`.",
                **{"class": type(self).__name__},
            )
        self.gamma = gamma
        self.num_bits = max(math.ceil(math.log2(self.num_experts)), 1)
        is_full = self.num_experts == 2**self.num_bits
        self.loss_weights = {**self.loss_weights, "unused": 0.0 if is_full else 1.0}

    def build(self, input_shape: Shape) -> None:
        width = checks.token_shape("DSelectKRouter", tuple(input_shape))
        leading = () if self.static else (width,)
        glorot = keras.initializers.GlorotUniform(self.seed)
        for name, size, initializer in (
            ("codes", self.num_selectors * self.num_bits, self.kernel_initializer),
            ("alpha", self.num_selectors, "zeros" if self.static else glorot),
        ):
            weight = self.add_weight(
                name=name,
                shape=(*leading, size),
                initializer=FiniteInitializer(initializer, f"router/{name}"),
                regularizer=self.kernel_regularizer,
                constraint=self.kernel_constraint,
            )
            setattr(self, name, weight)
            bias = None
            if self.use_bias:
                bias = self.add_weight(name=f"{name}_bias", shape=(size,), initializer="zeros")
            setattr(self, f"{name}_bias", bias)

    def selectors(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Computes z, float32 `(N, k m)`, selector by selector, and alpha, `(N, k)`.

        Args:
            inputs: `(N, d)` tokens, jitter included.

        One that `needs_token_ids` takes them as one more argument, `token_ids=None`.
        """
        return (
            self._of_tokens(inputs, self.codes, self.codes_bias),
            self._of_tokens(inputs, self.alpha, self.alpha_bias),
        )

    def decide(
        self, inputs: Tensor, mask: Tensor | None, training: bool | None, **more: Any
    ) -> Decision:
        z, alpha = self.selectors(inputs, **more)
        shares, importance = self._shares(z), softmax(alpha)  # (N, k, E), (N, k)
        weights = ops.sum(shares * ops.expand_dims(importance, -1), axis=1)
        is_used = ops.logical_not(weights <= 0)  # so that a NaN is seen
        logits = ops.log(ops.where(is_used, weights, _TINY))
        entropy = ops.sum(entropy_of(shares), axis=1)
        unused = ops.sum(1.0 / ops.maximum(ops.sum(shares, axis=-1), 1e-6), axis=-1)
        count = token_count(inputs, mask)
        return Decision(
            all_experts(weights),
            weights,
            logits,
            self.probabilities(logits),
            is_chosen=is_used,
            losses={
                "entropy": masked_sum(entropy, mask) / count,
                "unused": masked_sum(unused, mask) / count,
            },
        )

    def _of_tokens(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """`(N, size)`, of each token or the same for all."""
        if not self.static:
            products = ops.matmul(inputs, weight)
            return products if bias is None else products + bias
        row = ops.expand_dims(ops.convert_to_tensor(weight), 0)
        return ops.broadcast_to(row, (ops.shape(inputs)[0], weight.shape[-1]))

    def _shares(self, z: Tensor) -> Tensor:
        """The share of each selector in each expert, `(N, k, E)`: products over the bits."""
        steps = ops.reshape(self._smooth_step(z), (-1, self.num_selectors, 1, self.num_bits))
        # The highest bit first, as in the authors' code.
        codes = np.arange(self.num_experts)[:, None] >> np.arange(self.num_bits)[::-1] & 1
        return ops.prod(ops.where(ops.convert_to_tensor(codes == 1), steps, 1.0 - steps), axis=-1)

    def _smooth_step(self, z: Tensor) -> Tensor:
        cubic = -2.0 / self.gamma**3 * z**3 + 1.5 / self.gamma * z + 0.5
        half = self.gamma / 2.0
        step = ops.where(z < half, cubic, ops.ones_like(z))
        return ops.where(z > -half, step, ops.zeros_like(z))

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "top_k": self.num_selectors,
            "static": self.static,
            "gamma": self.gamma,
        }
