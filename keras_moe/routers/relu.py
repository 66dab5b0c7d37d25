"""ReLU routing, differentiable everywhere: ReMoE."""

from typing import Any, ClassVar

import keras
from keras import ops

from keras_moe.core import checks
from keras_moe.core.types import Config, Shape, Tensor
from keras_moe.dispatch import backend
from keras_moe.routers.base import Decision, LinearRouter
from keras_moe.routers.losses import masked_sum, token_count
from keras_moe.routers.pending import PendingSums
from keras_moe.routers.selection import pick, select_top_k, spread


@keras.saving.register_keras_serializable(package="keras_moe")
class ReLURouter(LinearRouter):
    """Sends each token to all experts of positive score; a penalty sets how many that are.

    weights = relu(x W); experts = those of positive weight, at most `max_experts`, largest first.
    The penalty is lambda * E / (k N) * sum_e load_e * mean_n weight_{n,e}: an L1 norm in which
    popular experts weigh more, and so a balance loss too. lambda is adapted in training: after each
    batch it is multiplied by `rate` where more than `top_k` experts per token were active on
    average, and divided by it where fewer were. Training so starts dense and becomes sparse.

    Shapes are static, so the cost is that of `max_experts` experts per token, as many as are active
    or not.

    Args:
        num_experts: Positive integer, the number of experts E.
        top_k: Integer between 1 and `num_experts`, the active experts per token to aim for.
            Defaults to `1`.
        max_experts: Integer between `top_k` and `num_experts`, the most experts a token can go to;
            None for all. Defaults to `None` (the paper's).
        initial_penalty: Positive number, lambda at first. Defaults to `1e-8` (the paper's).
        rate: Number above 1, what lambda changes by. Defaults to `1.2` (the paper's).
        update_every: Positive integer, the training batches per change of lambda: the
            `gradient_accumulation_steps` of an optimizer that has them. Defaults to `1`.
        **kwargs: Arguments of `LinearRouter`: `losses`, `jitter`, `use_bias`, `global_balance`,
            `kernel_initializer`, `kernel_regularizer`, `kernel_constraint`, `seed`. The `losses`
            are 0 by default: the penalty balances.

    Reference:
        Wang et al. 2024, "ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing",
        equations 5 to 10.
    """

    LOSSES: ClassVar[dict[str, float]] = {
        "z_loss": 0.0,
        "sequence_balance": 0.0,
        "first_choice_balance": 0.0,
        "local_entropy": 0.0,
        "global_entropy": 0.0,
    }

    fixes_top_k = True

    def __init__(
        self,
        num_experts: int,
        top_k: int = 1,
        *,
        max_experts: int | None = None,
        initial_penalty: float = 1e-8,
        rate: float = 1.2,
        update_every: int = 1,
        **kwargs: Any,
    ) -> None:
        aim = checks.positive_int("top_k", top_k)
        most = num_experts if max_experts is None else max_experts
        super().__init__(num_experts, most, **kwargs)
        self.target_experts = checks.int_between("top_k", aim, 1, self.top_k, "max_experts")
        self.initial_penalty = checks.positive("initial_penalty", initial_penalty)
        self.rate = checks.positive("rate", rate)
        if self.rate <= 1.0:
            checks.fail("`rate` must be a number above 1.", rate=rate)
        self.update_every = checks.positive_int("update_every", update_every)
        self.loss_weights = {**self.loss_weights, "l1": 1.0}  # lambda is its coefficient

    def build(self, input_shape: Shape) -> None:
        super().build(input_shape)
        self.penalty = self.add_weight(
            name="penalty",
            shape=(),
            initializer=keras.initializers.Constant(self.initial_penalty),
            dtype="float32",
            trainable=False,
            autocast=False,
        )
        self._pending = PendingSums(self, 1, self.update_every)

    def decide(
        self, inputs: Tensor, mask: Tensor | None, training: bool | None, **more: Any
    ) -> Decision:
        logits = self.logits(inputs, **more)
        experts = select_top_k(logits, self.top_k)
        values = pick(logits, experts)
        # Not `relu`, which hides on some backends that a token is not finite.
        weights = ops.where(values <= 0, ops.zeros_like(values), values)
        is_active = ops.logical_not(weights <= 0)
        count = token_count(logits, mask)
        gates = spread(weights, experts, self.num_experts)
        load = masked_sum(spread(ops.cast(is_active, "float32"), experts, self.num_experts), mask)
        fractions = ops.stop_gradient(load) * (self.num_experts / self.target_experts) / count
        penalty = self.penalty * 1.0  # a copy: torch differentiates with it after it has changed
        l1 = penalty * ops.sum(fractions * masked_sum(gates, mask)) / count
        if training and self.trainable and not backend.current.is_recomputing():
            excess = ops.sum(load) - self.target_experts * count  # over the assignments aimed for
            (excess,) = backend.current.sum_over_replicas([excess])
            sums, is_due = self._pending.add(ops.reshape(excess, (1,)))
            self.penalty.assign(penalty * ops.power(self.rate, is_due * ops.sign(sums[0])))
        return Decision(
            experts,
            weights,
            logits,
            self.probabilities(logits),
            is_chosen=is_active,
            losses={"l1": l1},
        )

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "top_k": self.target_experts,
            "max_experts": self.top_k,
            "initial_penalty": self.initial_penalty,
            "rate": self.rate,
            "update_every": self.update_every,
        }
