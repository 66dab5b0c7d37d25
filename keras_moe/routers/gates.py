"""The contract of gates: what each task takes of each expert."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe.core import checks
from keras_moe.core.constraints import per_expert
from keras_moe.core.initializers import PerExpertInitializer
from keras_moe.core.numerics import LOWEST, as_float
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

_TINY = 1e-20


class Gate(SavesSeed):
    """Base of gates: `(N, d)`, or one input for each task, `(T, N, d)`, to a `GateRouting`.

    A subclass says in `weigh` what each task takes of each expert. Dropout and access are done
    here.

    Args:
        num_experts: Positive integer, the number of experts E.
        num_tasks: Positive integer, the number of tasks T.
        access: Optional bools `(T, E)`, which experts a task may take: the others have a weight of
            exactly 0, and get no gradient from the task. Each task must have one. Defaults to
            `None`, all.
        dropout: Float in [0, 1). In training each expert of each task and example is left out
            with this probability and the other weights are scaled to the sum that all had, which
            keeps a gate from settling on one expert for ever. Where all would be left out, none
            is. Defaults to `0.0`.
        seed: Optional integer, seed of the dropout. Defaults to `None`.

    Call arguments:
        inputs: `(N, d)`, read by all gates, or `(T, N, d)`, one input per gate.
        mask: Optional bool `(N,)`, False at padding, which takes no part in losses.
        training: Whether dropout is on.

    Returns:
        A `keras_moe.GateRouting` of shape `(N, T, E)`.
    """

    def __init__(
        self,
        num_experts: int,
        num_tasks: int,
        *,
        access: Sequence[Sequence[bool]] | None = None,
        dropout: float = 0.0,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_loss_weights(type(self), kwargs)
        kwargs["dtype"] = "float32"
        super().__init__(**kwargs)
        self.num_experts = checks.positive_int("num_experts", num_experts)
        self.num_tasks = checks.positive_int("num_tasks", num_tasks)
        self.access = checked_access(access, self.num_tasks, self.num_experts)
        self.dropout = checks.rate("dropout", dropout)
        self.supports_masking = True
        self.seed = checks.optional(checks.integer, "seed", seed)
        self.seed_generator = keras.random.SeedGenerator(seed) if self.dropout else None

    def weigh(
        self, inputs: Tensor, mask: Tensor | None, training: bool | None
    ) -> tuple[Tensor, Tensor]:
        """Computes what each task takes of each expert, and the scores behind it.

        Args:
            inputs: `(N, d)` or `(T, N, d)`.
            mask: bool `(N,)`, False at padding, or None; for losses.
            training: Whether noise is on.

        Returns:
            Weights and scores, float32 `(N, T, E)` each. The softmax of the scores is each expert's
            share of the weights.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `weigh`.")

    def call(
        self, inputs: Tensor, mask: Tensor | None = None, training: bool | None = None
    ) -> GateRouting:
        inputs = as_float(inputs, self.compute_dtype)
        with backend.current.without_autocast():
            weights, logits = self.weigh(inputs, mask, training)
        if training and self.dropout:
            weights = self._dropped_out(weights)
        return GateRouting(weights, logits)

    def _dropped_out(self, weights: Tensor) -> Tensor:
        draw = keras.random.uniform(ops.shape(weights), dtype="float32", seed=self.seed_generator)
        is_kept = draw >= self.dropout
        # Where nothing of weight is kept, all is.
        is_left = ops.logical_and(is_kept, weights > 0)
        is_kept = ops.logical_or(is_kept, ops.logical_not(ops.any(is_left, -1, keepdims=True)))
        total = ops.sum(weights, axis=-1, keepdims=True)
        return total * scaled_to_one(ops.where(is_kept, weights, ops.zeros_like(weights)))

    def _only_accessible(self, values: Tensor, otherwise: float) -> Tensor:
        """Values `(..., T, E)`, replaced where a task has no access."""
        if self.access is None:
            return values
        return ops.where(ops.convert_to_tensor(np.array(self.access)), values, otherwise)

    def compute_mask(self, inputs: Tensor, previous_mask: Tensor | None = None) -> None:
        """Weights have no mask."""
        return

    def compute_output_spec(
        self, inputs: Tensor, mask: Tensor | None = None, training: bool | None = None
    ) -> GateRouting:
        shape = (tuple(inputs.shape)[-2], self.num_tasks, self.num_experts)
        return GateRouting(*(keras.KerasTensor(shape, dtype="float32") for _ in range(2)))

    def get_config(self) -> Config:
        config: Config = super().get_config()
        return {
            **config,
            "num_experts": self.num_experts,
            "num_tasks": self.num_tasks,
            "access": None if self.access is None else [list(row) for row in self.access],
            "dropout": self.dropout,
            "seed": self.seed,
        }


class LinearGate(Gate):
    """Base of gates with a kernel per task: scores[n,t,:] = x[n,:] @ kernel[t] (+ bias[t]).

    All gates are one matmul, in float32. A subclass says in `weights_of` what a row of scores
    weighs.

    Args:
        num_experts: Positive integer, the number of experts E.
        num_tasks: Positive integer, the number of tasks T.
        use_bias: Whether each gate has a bias per expert, 0 at first. Defaults to `False`.
        kernel_initializer: Initializer of one task's `(d, E)` kernel. Defaults to
            `"glorot_uniform"`.
        kernel_regularizer: Optional regularizer of the kernel. Defaults to `None`.
        kernel_constraint: Optional constraint of one task's kernel. Defaults to `None`.
        **kwargs: Arguments of `Gate`: `access`, `dropout`, `seed`.
    """

    AXES = (("kernel", "num_tasks", "input width", "num_experts"),)

    def __init__(
        self,
        num_experts: int,
        num_tasks: int,
        *,
        use_bias: bool = False,
        kernel_initializer: InitializerLike = "glorot_uniform",
        kernel_regularizer: RegularizerLike = None,
        kernel_constraint: ConstraintLike = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, num_tasks, **kwargs)
        self.use_bias = bool(use_bias)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)

    def build(self, input_shape: Shape) -> None:
        width = checks.token_shape(type(self).__name__, tuple(input_shape))
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

    def weights_of(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the weights of scores `(N, T, E)`, and scores whose softmax are their shares."""
        raise NotImplementedError(f"{type(self).__name__} must implement `weights_of`.")

    def weigh(
        self, inputs: Tensor, mask: Tensor | None, training: bool | None
    ) -> tuple[Tensor, Tensor]:
        if len(inputs.shape) == 2:
            width = inputs.shape[-1]
            flat = ops.reshape(ops.transpose(self.kernel, (1, 0, 2)), (width, -1))
            scores = ops.matmul(inputs, flat)  # all gates at once
            scores = ops.reshape(scores, (-1, self.num_tasks, self.num_experts))
        else:
            scores = ops.transpose(ops.matmul(inputs, self.kernel), (1, 0, 2))
        if self.use_bias:
            scores = scores + self.bias
        return self.weights_of(scores)

    def get_config(self) -> Config:
        return {
            **super().get_config(),
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
        }


def checked_access(
    access: Any, num_tasks: int, num_experts: int
) -> tuple[tuple[bool, ...], ...] | None:
    """Returns which experts each task may take, as tuples; None for all."""
    if access is None:
        return None
    mask = np.asarray(access)
    is_of_bools = mask.dtype == bool or (mask.dtype.kind in "iuf" and np.isin(mask, (0, 1)).all())
    if mask.shape != (num_tasks, num_experts) or not is_of_bools:
        checks.fail(
            f"`access` must be bools of shape (tasks, experts) = ({num_tasks}, {num_experts}).",
            access=access,
        )
    mask = mask.astype(bool)
    for task in np.flatnonzero(~mask.any(axis=1)):
        checks.fail(
            f"`access` must give every task an expert: task {task} has none.", access=access
        )
    for expert in np.flatnonzero(~mask.any(axis=0)):
        checks.fail(
            f"`access` must give every expert a task: nobody takes expert {expert}.", access=access
        )
    return tuple(tuple(map(bool, row)) for row in mask)


def log_shares(weights: Tensor) -> Tensor:
    """Scores whose softmax are the shares of weights of at least 0."""
    is_used = ops.logical_not(weights <= 0)  # so that a NaN is seen
    return ops.where(is_used, ops.log(ops.where(is_used, weights, _TINY)), LOWEST)
