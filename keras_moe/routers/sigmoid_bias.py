"""Sigmoid routing with a bias that balances the load: DeepSeek-V3."""

from typing import Any, ClassVar

import keras
from keras import ops

from keras_moe.core import checks
from keras_moe.core.numerics import LOWEST
from keras_moe.core.records import Routing
from keras_moe.core.types import Config, Shape, Tensor
from keras_moe.dispatch import backend
from keras_moe.routers.pending import PendingSums
from keras_moe.routers.selection import select_top_k
from keras_moe.routers.top_k import TopKRouter

_OF_A_GROUP = 2  # best experts whose scores make a group's


@keras.saving.register_keras_serializable(package="keras_moe")
class SigmoidBiasRouter(TopKRouter):
    """Chooses by sigmoid(x W) + bias, where the bias follows the load and weighs nothing.

    s = sigmoid(x W); experts = the k largest s + bias; weight_j = routed_scale * s_j / sum of the k
    chosen s. With k = 1 the weight is routed_scale * s, or the router would get no gradient. After
    each training batch, or every few, bias += bias_update_rate * sign(mean load - load): an expert
    that had more than its share becomes less attractive to the next batch. The bias is a float32
    weight that no optimizer sees and that is saved with the model.

    With `num_groups`, experts fall in groups of equal size, in order; a token may only choose from
    the `top_groups` groups whose two best s + bias are the largest.

    Args:
        num_experts: Positive integer, the number of experts E.
        top_k: Integer between 1 and `num_experts`. Defaults to `2`; DeepSeek-V3 has 8 of 256.
        bias_update_rate: Number of at least 0, what the bias changes by. Defaults to `0.001`
            (DeepSeek-V3's).
        update_every: Positive integer, the training batches whose load makes one change of the
            bias: the `gradient_accumulation_steps` of an optimizer that has them. Defaults to `1`.
        routed_scale: Positive number, what the weights sum to. Defaults to `1.0`; DeepSeek-V3 has
            2.5.
        num_groups: Positive integer that divides `num_experts`. Defaults to `1`; DeepSeek-V3 has 8.
        top_groups: Integer between 1 and `num_groups`, whose experts must be enough for `top_k`;
            None for all groups. Defaults to `None`; DeepSeek-V3 has 4.
        normalize: Whether the scores of the chosen are divided by their sum. Defaults to `True`.
        score: `"sigmoid"` or `"softmax"`. Defaults to `"sigmoid"`.
        **kwargs: Arguments of `TopKRouter`: `losses`, `jitter`, `use_bias`, `global_balance`,
            `kernel_initializer`, `kernel_regularizer`, `kernel_constraint`, `seed`. The `losses`
            are 0 by default: the bias balances. The balance loss takes each expert's share of a
            token's scores.

    Raises:
        ValueError: where groups do not divide the experts, or hold too few for `top_k`.

    Example:

    >>> import keras_moe
    >>> router = keras_moe.routers.SigmoidBiasRouter(
    ...     64, top_k=8, routed_scale=2.5, num_groups=8, top_groups=4
    ... )
    >>> layer = keras_moe.layers.MoE(64, 32, router=router, num_shared_experts=1)

    Reference:
        DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", equations 12 to 16; Wang et al. 2024,
        "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", algorithm 1.
    """

    LOSSES: ClassVar[dict[str, float]] = dict.fromkeys(TopKRouter.LOSSES, 0.0)

    def __init__(
        self,
        num_experts: int,
        top_k: int = 2,
        *,
        bias_update_rate: float = 0.001,
        update_every: int = 1,
        routed_scale: float = 1.0,
        num_groups: int = 1,
        top_groups: int | None = None,
        normalize: bool = True,
        score: str = "sigmoid",
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, top_k, normalize=normalize, score=score, **kwargs)
        self.bias_update_rate = checks.non_negative("bias_update_rate", bias_update_rate)
        self.update_every = checks.positive_int("update_every", update_every)
        self.routed_scale = checks.positive("routed_scale", routed_scale)
        self.num_groups = checks.positive_int("num_groups", num_groups)
        if self.num_experts % self.num_groups:
            checks.fail(
                f"`num_groups` must divide num_experts={self.num_experts}.", num_groups=num_groups
            )
        self.top_groups = (
            self.num_groups
            if top_groups is None
            else checks.int_between("top_groups", top_groups, 1, self.num_groups, "num_groups")
        )
        within_reach = self.top_groups * self.num_experts // self.num_groups
        if within_reach < self.top_k:
            checks.fail(
                f"`top_groups` must leave a token at least top_k={self.top_k} experts.",
                top_groups=top_groups,
            )

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        self.bias = self.add_weight(
            name="bias",
            shape=(self.num_experts,),
            initializer="zeros",
            dtype="float32",
            trainable=False,
            autocast=False,
        )
        self._pending = PendingSums(self, self.num_experts, self.update_every)

    def adapt(self, routing: Routing) -> None:
        if self.trainable and self.bias_update_rate:
            (load,) = backend.current.sum_over_replicas([routing.load])
            load, is_due = self._pending.add(load)
            is_short = ops.sign(ops.mean(load) - load)
            self.bias.assign(self.bias + self.bias_update_rate * is_due * is_short)

    def choose(self, logits: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        experts, weights = super().choose(logits, probabilities)
        return experts, self.routed_scale * weights

    def _ranked_by(self, logits: Tensor, scores: Tensor) -> Tensor:
        return self._within_groups(scores + self.bias)  # the bias chooses, and weighs nothing

    def _within_groups(self, scores: Tensor) -> Tensor:
        """Scores, `LOWEST` out of a token's reach; not 0, which a negative bias falls below."""
        if self.top_groups == self.num_groups:
            return scores
        size = self.num_experts // self.num_groups
        grouped = ops.reshape(ops.stop_gradient(scores), (-1, self.num_groups, size))
        best = ops.sort(grouped, axis=-1)[..., -min(_OF_A_GROUP, size) :]
        groups = select_top_k(ops.sum(best, axis=-1), self.top_groups)
        is_open = ops.any(ops.equal(ops.expand_dims(groups, -1), ops.arange(self.num_groups)), 1)
        grouped = ops.where(ops.expand_dims(is_open, -1), grouped, LOWEST)
        return ops.reshape(grouped, (-1, self.num_experts))

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "bias_update_rate": self.bias_update_rate,
            "update_every": self.update_every,
            "routed_scale": self.routed_scale,
            "num_groups": self.num_groups,
            "top_groups": self.top_groups,
        }
