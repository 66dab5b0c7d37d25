"""Expert choice: experts choose tokens."""

from typing import Any, ClassVar

import keras

from keras_moe.core import checks
from keras_moe.core.types import Config, Tensor
from keras_moe.routers.base import LinearRouter
from keras_moe.routers.selection import all_experts


@keras.saving.register_keras_serializable(package="keras_moe")
class ExpertChoiceRouter(LinearRouter):
    """Lets each expert take the tokens that it scores highest, the same number for all.

    p = softmax over the experts of x W; expert e takes the C = ceil(top_k N / E) tokens of largest
    p[:, e], N the tokens of the capacity group, and weighs them with p. All loads are equal by
    construction, so there is no balance loss; a token gets `top_k` experts on average, and may get
    none or many.

    **Not causal**: whether a token is chosen depends on all others of its group, later ones too.
    Use it in encoders, or with `capacity_group="example"` at least keep examples apart.

    The record rates all experts: `experts`, `weights` and `kept` are `(N, E)`, and `kept` says who
    was chosen.

    Args:
        num_experts: Positive integer, the number of experts E.
        top_k: Integer between 1 and `num_experts`, the mean number of experts per token, which the
            paper calls capacity factor. Defaults to `2` (the paper's).
        **kwargs: Arguments of `LinearRouter`: `losses`, `jitter`, `use_bias`, `global_balance`,
            `kernel_initializer`, `kernel_regularizer`, `kernel_constraint`, `seed`. The `losses`
            are 0 by default.

    Reference:
        Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing", section 3.2.
    """

    LOSSES: ClassVar[dict[str, float]] = {
        "z_loss": 0.0,
        "local_entropy": 0.0,
        "global_entropy": 0.0,
    }
    chooses_tokens = True
    fixes_top_k = True

    def __init__(self, num_experts: int, top_k: int = 2, **kwargs: Any) -> None:
        super().__init__(num_experts, num_experts, **kwargs)
        self.experts_per_token = checks.int_between(
            "top_k", checks.positive_int("top_k", top_k), 1, self.num_experts, "num_experts"
        )

    def looks_ahead(self, has_capacity: bool) -> str | None:
        return "where experts choose their tokens, a token's route depends on later ones"

    def choose(self, logits: Tensor, probabilities: Tensor) -> tuple[Tensor, Tensor]:
        return all_experts(logits), probabilities

    def get_config(self) -> Config:
        return {**super().get_config(), "top_k": self.experts_per_token}
