"""The gates of MMoE: one softmax over the experts per task."""

from typing import Any

import keras

from keras_moe.core import checks
from keras_moe.core.numerics import LOWEST, softmax
from keras_moe.core.types import Config, Tensor
from keras_moe.routers.gates import LinearGate


@keras.saving.register_keras_serializable(package="keras_moe")
class SoftmaxGate(LinearGate):
    """All tasks' gates as one matmul, in float32: weights[n,t,:] = softmax(x[n,:] @ kernel[t]).

    With `use_bias`, bias[t] is added before the softmax; the scores are divided by `temperature`.

    Args:
        num_experts: Positive integer, the number of experts E.
        num_tasks: Positive integer, the number of tasks T.
        temperature: Positive number that scores are divided by: above 1 for weights that are more
            alike. Defaults to `1.0`.
        **kwargs: Arguments of `LinearGate` and `Gate`: `access`, `dropout` (the YouTube paper uses
            0.1), `use_bias`, `kernel_initializer`, `kernel_regularizer`, `kernel_constraint`,
            `seed`.

    Call arguments:
        inputs: `(N, d)`, read by all gates, or `(T, N, d)`, one input per gate.
        mask: Optional bool `(N,)`, False at padding, which takes no part in losses.
        training: Whether dropout is on.

    Returns:
        A `keras_moe.GateRouting` of shape `(N, T, E)`.

    Reference:
        Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with Multi-gate
        Mixture-of-Experts", equations 6 to 8; Zhao et al. 2019, "Recommending What Video to Watch
        Next", section 5.3 (dropout).
    """

    def __init__(
        self, num_experts: int, num_tasks: int, *, temperature: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(num_experts, num_tasks, **kwargs)
        self.temperature = checks.positive("temperature", temperature)

    def weights_of(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        logits = scores if self.temperature == 1.0 else scores / self.temperature
        logits = self._only_accessible(logits, LOWEST)
        return softmax(logits), logits

    def get_config(self) -> Config:
        return {**super().get_config(), "temperature": self.temperature}
