"""The gates of MMoE: one softmax over the experts per task."""

from typing import Any

import keras
from keras import ops

from keras_moe.core import checks
from keras_moe.core.constraints import per_expert
from keras_moe.core.initializers import PerExpertInitializer
from keras_moe.core.numerics import as_float, softmax
from keras_moe.core.records import GateRouting
from keras_moe.core.seeds import SavesSeed
from keras_moe.core.types import (
    Config,
    ConstraintLike,
    InitializerLike,
    RegularizerLike,
    Shape,
    Tensor,
)
from keras_moe.dispatch import backend
from keras_moe.routers.loss_weights import refuse_loss_weights
from keras_moe.routers.selection import scaled_to_one


@keras.saving.register_keras_serializable(package="keras_moe")
class SoftmaxGate(SavesSeed):
    """All tasks' gates as one matmul, in float32: weights[n,t,:] = softmax(x[n,:] @ kernel[t]).

    With `use_bias`, bias[t] is added before the softmax.

    Args:
        num_experts: Positive integer, the number of experts E.
        num_tasks: Positive integer, the number of tasks T.
        dropout: Float in [0, 1). In training each expert of each task and example is left out
            with this probability and the other weights are scaled to sum to 1 again, which keeps a
            gate from settling on one expert for ever. Where all would be left out, none is.
            Defaults to `0.0`; the YouTube paper uses 0.1.
        use_bias: Whether each gate has a bias per expert, 0 at first. Defaults to `False` (the
            paper's).
        kernel_initializer: Initializer of one task's `(d, E)` kernel. Defaults to
            `"glorot_uniform"`.
        kernel_regularizer: Optional regularizer of the kernel. Defaults to `None`.
        kernel_constraint: Optional constraint of one task's kernel. Defaults to `None`.
        seed: Optional integer, seed of the dropout. Defaults to `None`.

    Call arguments:
        inputs: `(N, d)`, read by all gates, or `(T, N, d)`, one input per gate.
        training: Whether dropout is on.

    Returns:
        A `keras_moe.GateRouting` of shape `(N, T, E)`.

    Reference:
        Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with Multi-gate
        Mixture-of-Experts", equations 6 to 8; Zhao et al. 2019, "Recommending What Video to Watch
        Next", section 5.3 (dropout).
    """

    AXES = (("kernel", "num_tasks", "input width", "num_experts"),)

    def __init__(
        self,
        num_experts: int,
        num_tasks: int,
        *,
        dropout: float = 0.0,
        use_bias: bool = False,
        kernel_initializer: InitializerLike = "glorot_uniform",
        kernel_regularizer: RegularizerLike = None,
        kernel_constraint: ConstraintLike = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_loss_weights(type(self), kwargs)
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        self.num_experts = checks.positive_int("num_experts", num_experts)
        self.num_tasks = checks.positive_int("num_tasks", num_tasks)
        self.dropout = checks.rate("dropout", dropout)
        self.use_bias = bool(use_bias)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.seed = checks.optional(checks.integer, "seed", seed)
        self.seed_generator = keras.random.SeedGenerator(seed) if self.dropout else None

    def build(self, input_shape: Shape) -> None:
        width = checks.token_shape("SoftmaxGate", tuple(input_shape))
        self.kernel = self.add_weight(
            name="kernel",
            shape=(self.num_tasks, width, self.num_experts),
            initializer=PerExpertInitializer(self.kernel_initializer, "gates/kernel"),
            regularizer=self.kernel_regularizer,
            constraint=per_expert(self.kernel_constraint),
        )
        if self.use_bias:
            self.bias = self.add_weight(
                name="bias", shape=(self.num_tasks, self.num_experts), initializer="zeros"
            )

    def call(self, inputs: Tensor, training: bool | None = None) -> GateRouting:
        inputs = as_float(inputs, self.compute_dtype)
        with backend.current.without_autocast():
            logits = self._logits(inputs)
            weights = softmax(logits)
        if training and self.seed_generator is not None:
            weights = self._dropped_out(weights)
        return GateRouting(weights, logits)

    def _logits(self, inputs: Tensor) -> Tensor:
        if len(inputs.shape) == 2:
            width = inputs.shape[-1]
            flat = ops.reshape(ops.transpose(self.kernel, (1, 0, 2)), (width, -1))
            logits = ops.matmul(inputs, flat)  # all gates at once
            logits = ops.reshape(logits, (-1, self.num_tasks, self.num_experts))
        else:
            logits = ops.transpose(ops.matmul(inputs, self.kernel), (1, 0, 2))
        if self.use_bias:
            logits = logits + self.bias
        return logits

    def _dropped_out(self, weights: Tensor) -> Tensor:
        draw = keras.random.uniform(ops.shape(weights), dtype="float32", seed=self.seed_generator)
        is_kept = draw >= self.dropout
        is_kept = ops.logical_or(is_kept, ops.logical_not(ops.any(is_kept, -1, keepdims=True)))
        return scaled_to_one(ops.where(is_kept, weights, ops.zeros_like(weights)))

    def compute_output_spec(self, inputs: Tensor, training: bool | None = None) -> GateRouting:
        shape = (tuple(inputs.shape)[-2], self.num_tasks, self.num_experts)
        return GateRouting(*(keras.KerasTensor(shape, dtype="float32") for _ in range(2)))

    def get_config(self) -> Config:
        config: Config = super().get_config()
        return {
            **config,
            "num_experts": self.num_experts,
            "num_tasks": self.num_tasks,
            "dropout": self.dropout,
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "seed": self.seed,
        }
