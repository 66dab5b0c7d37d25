"""The stacked bank of expert networks."""

import math
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops
from keras.src.backend import AutocastScope

from keras_moe.core import checks
from keras_moe.core.constraints import per_expert
from keras_moe.core.initializers import PerExpertInitializer
from keras_moe.core.numerics import as_float
from keras_moe.core.seeds import SavesSeed
from keras_moe.core.types import (
    Activation,
    Config,
    ConstraintLike,
    InitializerLike,
    RegularizerLike,
    Shape,
    Size,
    Tensor,
)
from keras_moe.dispatch import backend
from keras_moe.dispatch.grouped import grouped_walk
from keras_moe.dispatch.layout import Rows, Stage
from keras_moe.layers.sublayers import name_or_default
from keras_moe.routers.loss_weights import refuse_loss_weights

_MANY_ROWS = 512  # from here on a plain matmul per expert beats a batched one on a CPU


@keras.saving.register_keras_serializable(package="keras_moe")
class ExpertMLP(SavesSeed):
    """E multilayer perceptrons with stacked weights, run as one batched matmul per layer.

    Many rows that all experts read are run expert by expert on a CPU, where that is faster.

    For expert e and layer i: h = act(h @ kernel_i[e] + bias_i[e]), the last layer without act
    unless `activate_last`. With `gated`, a hidden layer is
    h = act(h @ gate_kernel_i[e] + gate_bias_i[e]) * (h @ kernel_i[e] + bias_i[e]).

    Every expert's weights are drawn on their own with one expert's fans. Weights:
    `kernel_i (E, in, out)`, `bias_i (E, out)`, and `gate_kernel_i`, `gate_bias_i` of the same
    shapes.

    Args:
        num_experts: Positive integer, the number of experts E.
        units: Positive integer or a sequence of them, the output width of each layer; None as the
            last one for the inputs' width d.
        activation: Activation of the hidden layers. Defaults to `"gelu"`.
        gated: Whether hidden layers are gated linear units. Defaults to `False`.
        activate_last: Whether the last layer has the activation too, as in MMoE. Defaults to
            `False`.
        dropout: Float in [0, 1), dropout after each activated layer. Defaults to `0.0`.
        use_bias: Whether the layers have biases. Defaults to `True`.
        kernel_initializer: Initializer of one expert's kernel. Defaults to `"glorot_uniform"`.
        bias_initializer: Initializer of one expert's bias. Defaults to `"zeros"`.
        kernel_regularizer: Optional regularizer, called with stacked kernels. Defaults to `None`.
        bias_regularizer: Optional regularizer, called with stacked biases. Defaults to `None`.
        kernel_constraint: Optional constraint of one expert's kernels. Defaults to `None`.
        bias_constraint: Optional constraint of one expert's biases. Defaults to `None`.
        seed: Optional integer, seed of the dropout. Defaults to `None`.

    Call arguments:
        inputs: `(E, C, d)`, C rows for each expert, or `(1, C, d)`, rows that all experts read.
            With `block_experts`, `(G, B, d)`: blocks of B rows of one expert each.
        block_experts: Optional int32 `(G,)`, the expert of each block.
        rows: Optional `keras_moe.dispatch.Rows`, who goes where. The inputs are then tokens
            `(N, d)`, and the outputs each token's weighted sum `(N, out)`.
        training: Whether dropout is on.

    Input shape:
        `(E, C, d)`, `(1, C, d)`, `(G, B, d)` or `(N, d)`.

    Output shape:
        `(E, C, units[-1])`, `(G, B, units[-1])` with `block_experts`, `(N, units[-1])` with
        `rows`.

    Raises:
        ValueError: on sizes that are not positive, or a bank of inputs of another size than E.

    Example:

    >>> import numpy as np
    >>> from keras_moe import layers
    >>> bank = layers.ExpertMLP(num_experts=4, units=[32, 8], activation="relu")
    >>> tuple(bank(np.zeros((4, 10, 8), "float32")).shape)
    (4, 10, 8)
    """

    takes_dynamic_blocks = True
    AXES = (
        ("kernel", "num_experts", "kernel input width", "units"),
        ("gate_kernel", "num_experts", "kernel input width", "units"),
        ("bias", "num_experts", "units"),
        ("gate_bias", "num_experts", "units"),
    )

    def __init__(
        self,
        num_experts: int,
        units: int | Sequence[int | None],
        activation: Activation = "gelu",
        *,
        gated: bool = False,
        activate_last: bool = False,
        dropout: float = 0.0,
        use_bias: bool = True,
        kernel_initializer: InitializerLike = "glorot_uniform",
        bias_initializer: InitializerLike = "zeros",
        kernel_regularizer: RegularizerLike = None,
        bias_regularizer: RegularizerLike = None,
        kernel_constraint: ConstraintLike = None,
        bias_constraint: ConstraintLike = None,
        seed: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_loss_weights(type(self), kwargs)
        super().__init__(name=name_or_default(name, "expert_mlp"), **kwargs)
        self.num_experts = checks.positive_int("num_experts", num_experts)
        self._units = _checked_widths(units)
        self.activation = keras.activations.get(activation)
        self.gated = bool(gated)
        self.activate_last = bool(activate_last)
        self._num_activated = len(self._units) - (not activate_last)
        self.dropout = checks.rate("dropout", dropout)
        self.use_bias = bool(use_bias)
        self.kernel_initializer = keras.initializers.get(kernel_initializer)
        self.bias_initializer = keras.initializers.get(bias_initializer)
        self.kernel_regularizer = keras.regularizers.get(kernel_regularizer)
        self.bias_regularizer = keras.regularizers.get(bias_regularizer)
        self.kernel_constraint = keras.constraints.get(kernel_constraint)
        self.bias_constraint = keras.constraints.get(bias_constraint)
        self.seed = checks.optional(checks.integer, "seed", seed)
        self.seed_generator = keras.random.SeedGenerator(seed) if self.dropout else None
        # Not where the activation is a layer, with weights of its own.
        self.takes_rows = not isinstance(self.activation, keras.layers.Layer)

    @property
    def units(self) -> tuple[int | None, ...]:
        """The output width of each layer; None as the last one for the inputs' width."""
        return self._units

    def build(self, input_shape: Shape) -> None:
        width = checks.token_shape("ExpertMLP", tuple(input_shape), min_rank=3)
        self._kernels, self._biases = [], []
        self._gate_kernels, self._gate_biases = [], []
        for index, units in enumerate(self._widths(width)):
            self._kernels.append(self._add_kernel(f"kernel_{index}", width, units))
            self._biases.append(self._add_bias(f"bias_{index}", units))
            if self.gated and index < self._num_activated:
                self._gate_kernels.append(self._add_kernel(f"gate_kernel_{index}", width, units))
                self._gate_biases.append(self._add_bias(f"gate_bias_{index}", units))
            width = units

    def _widths(self, width: int) -> list[int]:
        """The output width of each layer, for inputs of a width."""
        return [width if units is None else units for units in self.units]

    def _add_kernel(self, name: str, width: int, units: int) -> Any:
        return self.add_weight(
            name=name,
            shape=(self.num_experts, width, units),
            initializer=PerExpertInitializer(self.kernel_initializer, f"{self.name}/{name}"),
            regularizer=self.kernel_regularizer,
            constraint=per_expert(self.kernel_constraint),
        )

    def _add_bias(self, name: str, units: int) -> Any:
        if not self.use_bias:
            return None
        return self.add_weight(
            name=name,
            shape=(self.num_experts, units),
            initializer=PerExpertInitializer(self.bias_initializer, f"{self.name}/{name}"),
            regularizer=self.bias_regularizer,
            constraint=per_expert(self.bias_constraint),
        )

    def call(
        self,
        inputs: Tensor,
        block_experts: Tensor | None = None,
        rows: Rows | None = None,
        training: bool | None = None,
    ) -> Tensor:
        inputs = as_float(inputs, self.compute_dtype)
        if rows is not None:
            with AutocastScope(None):  # only experts that have rows are cast, one by one
                stages = self._stages()
            if training and self.seed_generator is not None:
                stages = self._with_dropout(stages, ops.shape(rows.slots.assignment)[0])
            walk = grouped_walk if rows.is_grouped else backend.current.walk
            return walk(inputs, rows, stages)
        if block_experts is None:
            self._check_bank_size(inputs)
            if _is_faster_one_by_one(inputs):
                shared = ops.squeeze(inputs, axis=0)
                outputs = [self._run(shared, stages, training) for stages in self._by_expert()]
                return ops.stack(outputs)
        return self._run(inputs, self._bank(block_experts), training)

    def _run(self, hidden: Tensor, stages: list[Stage], training: bool | None) -> Tensor:
        for stage in stages:
            sums = [ops.matmul(hidden, kernel) for kernel in stage.kernels]
            if stage.biases:
                sums = [each + bias for each, bias in zip(sums, stage.biases, strict=True)]
            if stage.activation is None:
                return sums[0]
            hidden = stage.activation(*sums)
            if training and self.seed_generator is not None:
                hidden = keras.random.dropout(hidden, self.dropout, seed=self.seed_generator)
        return hidden

    def _bank(self, block_experts: Tensor | None) -> list[Stage]:
        """The layers of all experts, or of each block's."""

        def of_blocks(weights: Tensor) -> Tensor:
            return weights if block_experts is None else _take_experts(weights, block_experts)

        return [
            stage._replace(
                kernels=tuple(of_blocks(kernel) for kernel in stage.kernels),
                biases=tuple(ops.expand_dims(of_blocks(bias), 1) for bias in stage.biases),
            )
            for stage in self._stages()
        ]

    def _by_expert(self) -> list[list[Stage]]:
        """The layers of each expert: kernels `(in, out)` and biases `(1, out)`."""

        def parts(weights: Tensor) -> Any:  # whose gradient is one concatenation
            return ops.split(weights, self.num_experts, axis=0)

        split = [
            (stage, [parts(k) for k in stage.kernels], [parts(b) for b in stage.biases])
            for stage in self._stages()
        ]
        return [
            [
                stage._replace(
                    kernels=tuple(ops.squeeze(each[expert], axis=0) for each in kernels),
                    biases=tuple(each[expert] for each in biases),
                )
                for stage, kernels, biases in split
            ]
            for expert in range(self.num_experts)
        ]

    def _stages(self) -> list[Stage]:
        """The layers of the whole bank, without dropout."""
        stages = []
        for index in range(len(self.units)):
            kernels, biases = [self._kernels[index]], [self._biases[index]]
            activation = self.activation if index < self._num_activated else None
            if self.gated and activation is not None:
                activation = self._gated_activation
                kernels = [self._gate_kernels[index], *kernels]
                biases = [self._gate_biases[index], *biases]
            stages.append(
                Stage(
                    kernels=tuple(ops.convert_to_tensor(k.value) for k in kernels),
                    biases=tuple(ops.convert_to_tensor(b.value) for b in biases if b is not None),
                    activation=activation,
                )
            )
        return stages

    def _with_dropout(self, stages: list[Stage], count: Size) -> list[Stage]:
        """The layers with dropout's factors for `count` rows."""
        dropped = []
        for stage, kernel in zip(stages, self._kernels, strict=True):
            scale = None
            if stage.activation is not None:
                ones = ops.ones((count, kernel.shape[-1]), dtype=self.compute_dtype)
                scale = keras.random.dropout(ones, self.dropout, seed=self.seed_generator)
            dropped.append(stage._replace(scale=scale))
        return dropped

    def _gated_activation(self, gates: Tensor, values: Tensor) -> Tensor:
        return self.activation(gates) * values

    def _check_bank_size(self, inputs: Tensor) -> None:
        if inputs.shape[0] not in (None, 1, self.num_experts):
            checks.fail(
                "`ExpertMLP` expects inputs of shape (E, C, d) or (1, C, d) with "
                f"E={self.num_experts}.",
                shape=tuple(inputs.shape),
            )

    def compute_output_spec(
        self,
        inputs: Tensor,
        block_experts: Tensor | None = None,
        rows: Rows | None = None,
        training: bool | None = None,
    ) -> Tensor:
        width = self._widths(inputs.shape[-1])[-1]
        if rows is not None:
            return keras.KerasTensor((inputs.shape[0], width), dtype=self.compute_dtype)
        if block_experts is None:
            self._check_bank_size(inputs)
            first = self.num_experts
        else:
            first = inputs.shape[0]
        return keras.KerasTensor((first, inputs.shape[1], width), dtype=self.compute_dtype)

    def compute_output_shape(self, input_shape: Shape) -> Shape:
        width = checks.token_shape("ExpertMLP", tuple(input_shape), min_rank=3)
        return (self.num_experts, tuple(input_shape)[1], self._widths(width)[-1])

    def get_config(self) -> Config:
        config: Config = super().get_config()
        return {
            **config,
            "num_experts": self.num_experts,
            "units": list(self.units),
            "activation": keras.activations.serialize(self.activation),
            "gated": self.gated,
            "activate_last": self.activate_last,
            "dropout": self.dropout,
            "use_bias": self.use_bias,
            "kernel_initializer": keras.initializers.serialize(self.kernel_initializer),
            "bias_initializer": keras.initializers.serialize(self.bias_initializer),
            "kernel_regularizer": keras.regularizers.serialize(self.kernel_regularizer),
            "bias_regularizer": keras.regularizers.serialize(self.bias_regularizer),
            "kernel_constraint": keras.constraints.serialize(self.kernel_constraint),
            "bias_constraint": keras.constraints.serialize(self.bias_constraint),
            "seed": self.seed,
        }


def _is_faster_one_by_one(inputs: Tensor) -> bool:
    """Whether rows that all experts read are better given to one expert after the other.

    On a CPU a batched matmul reads the rows anew for each expert and keeps all of them in flight;
    a plain one has a better kernel. Few rows wait for the calls instead: docs/design/0011.
    """
    rows = ops.shape(inputs)[1]
    if inputs.shape[0] != 1 or not backend.current.is_on_cpu(inputs):
        return False
    return not isinstance(rows, int) or rows >= _MANY_ROWS


def _take_experts(bank: Tensor, experts: Tensor) -> Tensor:
    """The weights of `experts`, one slice for each, with repeats.

    Taken through a reshape, whose gradient is dense: `take` alone gives TensorFlow sparse gradients
    with repeated rows, which Keras's Adam (3.15.1) squares one by one before it adds them.
    """
    rows = ops.reshape(bank, (bank.shape[0], math.prod(bank.shape[1:])))
    return ops.reshape(ops.take(rows, experts, axis=0), (-1, *bank.shape[1:]))


def _checked_widths(units: Any) -> tuple[int | None, ...]:
    if isinstance(units, list | tuple) and units and units[-1] is None:
        return (*checked_units("units", units[:-1]), None)
    return checked_units("units", units)


def checked_units(name: str, units: Any) -> tuple[int, ...]:
    """Returns layer widths as a tuple of positive integers."""
    is_sequence = isinstance(units, Sequence) and not isinstance(units, str)
    widths = tuple(units) if is_sequence else (units,)
    if not widths:
        checks.fail(f"`{name}` must name at least one layer width.", **{name: units})
    return tuple(checks.positive_int(name, width) for width in widths)
