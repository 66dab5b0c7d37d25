"""Gates that weigh each expert on its own."""

from typing import Any

import keras
from keras import ops

from keras_moe.core.types import Config, Tensor
from keras_moe.routers.gates import LinearGate, log_shares
from keras_moe.routers.selection import scaled_to_one


@keras.saving.register_keras_serializable(package="keras_moe")
class SigmoidGate(LinearGate):
    """Weighs each expert on its own: weights[n,t,e] = sigmoid((x[n,:] @ kernel[t])_e).

    An expert's weight says nothing of another's: tasks can take much of all, or little of any. With
    `normalize` the weights are divided by their sum.

    Args:
        num_experts: Positive integer, the number of experts E.
        num_tasks: Positive integer, the number of tasks T.
        normalize: Whether the weights of a task sum to 1. Defaults to `False`.
        **kwargs: Arguments of `LinearGate` and `Gate`: `access`, `dropout`, `use_bias`,
            `kernel_initializer`, `kernel_regularizer`, `kernel_constraint`, `seed`.

    Call arguments:
        inputs: `(N, d)`, read by all gates, or `(T, N, d)`, one input per gate.
        mask: Optional bool `(N,)`, False at padding, which takes no part in losses.
        training: Whether dropout is on.

    Returns:
        A `keras_moe.GateRouting` of shape `(N, T, E)`.
    """

    def __init__(
        self, num_experts: int, num_tasks: int, *, normalize: bool = False, **kwargs: Any
    ) -> None:
        super().__init__(num_experts, num_tasks, **kwargs)
        self.normalize = bool(normalize)

    def weights_of(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weights = self._only_accessible(ops.sigmoid(scores), 0.0)
        return scaled_to_one(weights) if self.normalize else weights, log_shares(weights)

    def get_config(self) -> Config:
        return {**super().get_config(), "normalize": self.normalize}
