"""Multi-gate mixture of experts for multi-task learning."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeAlias

import keras
from keras import ops

from keras_moe.core import checks, numerics
from keras_moe.core.initializers import derived_seed, reseeded
from keras_moe.core.loading import NamesSizes
from keras_moe.core.records import GateRouting
from keras_moe.core.types import (
    Activation,
    Config,
    ConstraintLike,
    ExpertsLike,
    InitializerLike,
    RegularizerLike,
    Shape,
    Tensor,
)
from keras_moe.dispatch import backend
from keras_moe.layers.counts import RunningSums, check_built
from keras_moe.layers.expert_mlp import ExpertMLP, checked_units
from keras_moe.layers.feed_forward import NAMED_EXPERTS, bank_from, refuse_descriptions
from keras_moe.layers.freezing import FreezesParts, freeze_parts
from keras_moe.layers.rematerialization import RematerializesExperts
from keras_moe.layers.sublayers import adopt, build_once, config_of, name_or_default
from keras_moe.layers.tasks import GivesByTask, access_of, checked_tasks
from keras_moe.layers.tokens import flat_mask, zero_where_padded
from keras_moe.routers import router_gate
from keras_moe.routers.gates import Gate, LinearGate
from keras_moe.routers.loss_weights import refuse_loss_weights
from keras_moe.routers.router_gate import RouterGate
from keras_moe.routers.sigmoid_gate import SigmoidGate
from keras_moe.routers.softmax_gate import SoftmaxGate

GateLike: TypeAlias = Gate | str | Config | Callable[..., Gate]

_BANKS: dict[str, type[LinearGate]] = {"softmax": SoftmaxGate, "sigmoid": SigmoidGate}


@keras.saving.register_keras_serializable(package="keras_moe")
class MMoE(FreezesParts, RematerializesExperts, GivesByTask, NamesSizes):
    """Experts that all tasks share, and one gate per task that mixes them.

    gates[n,t,:] = softmax(x[n,:] @ kernel[t])
    y_t[n,:]     = sum_e gates[n,t,e] * expert_e(x[n,:])
    where expert_e is a multilayer perceptron with the activation on every layer. All gates
    are one matmul, and all experts one per layer; on a CPU many rows go expert by expert instead.

    Args:
        num_experts: Positive integer, the number of experts E.
        expert_units: Positive integer or a sequence of them, the width of each expert layer. Only
            `None` where `experts` are Keras layers.
        tasks: Positive integer, for a list of outputs, or a sequence of names, for a dict.
        experts: `"mlp"`, `"glu"` (gated layers), a bank such as `ExpertMLP`, a Keras layer of which
            E copies with new random weights are made, the config of one of these, or a list of E
            Keras layers; what the layer does not build itself takes none of the arguments below
            that describe experts. Defaults to `"mlp"`.
        activation: Activation of every expert layer. Defaults to `"relu"`.
        use_bias: Whether experts have biases. Defaults to `True`.
        dropout: Float in [0, 1), dropout after each expert layer. Defaults to `0.0`.
        gate: `"softmax"`, `"sigmoid"` (each expert's own weight), a router's name for a choice per
            example, as `"top_k"`, `"noisy_top_k"` or `"dselect_k"` (see
            `keras_moe.routers.RouterGate`), a config, a `keras_moe.routers.Gate`, which then brings
            its own dropout, bias and access, or a function of the experts E, the tasks and the
            access that returns one. Defaults to `"softmax"`.
        gate_units: Sequence of positive integers, hidden layers of each gate with `activation` and
            biases; empty for linear gates (the paper's). Defaults to `()`.
        gate_dropout: Float in [0, 1), the probability that in training an expert is left out of a
            gate, whose other weights are scaled to sum to 1. Zhao et al. 2019 use 0.1 against gates
            that settle on one expert. Defaults to `0.0`.
        gate_use_bias: Whether each gate has a bias per expert. Defaults to `False` (the paper's).
        access: Optional bools `(tasks, experts)`, or a dict from a task's name to the numbers of
            its experts: what a task may take. Of others it takes exactly nothing, and gives them
            no gradient. Defaults to `None`, all of them.
        kernel_initializer: Initializer of one expert's kernels. Defaults to `"glorot_uniform"`.
        bias_initializer: Initializer of one expert's biases. Defaults to `"zeros"`.
        gate_initializer: Initializer of one task's gate kernel. Defaults to `"glorot_uniform"`.
        kernel_regularizer: Optional regularizer, called with the experts' stacked kernels.
            Defaults to `None`.
        bias_regularizer: Optional regularizer, called with the experts' stacked biases. Defaults to
            `None`.
        gate_regularizer: Optional regularizer of the gates' kernel. Defaults to `None`.
        kernel_constraint: Optional constraint of one expert's kernels. Defaults to `None`.
        bias_constraint: Optional constraint of one expert's biases. Defaults to `None`.
        seed: Optional integer, seed of both dropouts. Defaults to `None`.

    Call arguments:
        inputs: `(..., d)` of rank 2 or more.
        mask: Optional bool `(...)`, False at padding, whose outputs are 0.
        training: Whether dropout and counting are on.
        return_routing: Whether to return the `keras_moe.GateRouting` too. Defaults to `False`.

    Input shape:
        `(batch, ..., d)`

    Output shape:
        `(batch, ..., expert_units[-1])` for each task.

    Returns:
        A list of outputs, one per task, or a dict where `tasks` are names; with
        `return_routing=True` also the `GateRouting`, `(batch, ..., tasks, E)`.

    Raises:
        ValueError: on sizes that are not positive, repeated task names, an unknown gate, inputs of
            rank 1, or a mask that has not one entry per token.

    Example:

    >>> import numpy as np
    >>> from keras_moe import layers
    >>> layer = layers.MMoE(num_experts=8, expert_units=[64, 32], tasks=["click", "like"])
    >>> outputs = layer(np.zeros((4, 16), "float32"))
    >>> {task: tuple(output.shape) for task, output in outputs.items()}
    {'click': (4, 32), 'like': (4, 32)}

    Reference:
        Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with Multi-gate
        Mixture-of-Experts", section 4.2.
    """

    parts = ("gates", "gate_hidden", "experts")
    AXES = (("importance", "limbs", "tasks", "num_experts"),)

    def __init__(
        self,
        num_experts: int,
        expert_units: int | Sequence[int] | None,
        tasks: int | Sequence[str],
        *,
        experts: ExpertsLike = "mlp",
        activation: Activation = "relu",
        use_bias: bool = True,
        dropout: float = 0.0,
        gate: GateLike = "softmax",
        gate_units: Sequence[int] = (),
        gate_dropout: float = 0.0,
        gate_use_bias: bool = False,
        access: Sequence[Sequence[bool]] | Mapping[str, Sequence[int]] | None = None,
        kernel_initializer: InitializerLike = "glorot_uniform",
        bias_initializer: InitializerLike = "zeros",
        gate_initializer: InitializerLike = "glorot_uniform",
        kernel_regularizer: RegularizerLike = None,
        bias_regularizer: RegularizerLike = None,
        gate_regularizer: RegularizerLike = None,
        kernel_constraint: ConstraintLike = None,
        bias_constraint: ConstraintLike = None,
        seed: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_loss_weights(type(self), kwargs)
        super().__init__(name=name_or_default(name, "mmoe"), **kwargs)
        self.num_experts = checks.positive_int("num_experts", num_experts)
        self.tasks = checked_tasks(tasks)
        self.dropout = checks.rate("dropout", dropout)
        self.num_tasks = self.tasks if isinstance(self.tasks, int) else len(self.tasks)
        is_linear = isinstance(gate_units, Sequence) and not gate_units
        self.gate_units = () if is_linear else checked_units("gate_units", gate_units)
        self.gate_dropout = checks.rate("gate_dropout", gate_dropout)
        self.gate_use_bias = bool(gate_use_bias)
        self.access = access_of(access, self.tasks, self.num_tasks, self.num_experts)
        self.gate_initializer = keras.initializers.get(gate_initializer)
        self.gate_regularizer = keras.regularizers.get(gate_regularizer)
        self.seed = checks.optional(checks.integer, "seed", seed)
        self.supports_masking = True
        describing: dict[str, Any] = {
            "activation": activation,
            "use_bias": use_bias,
            "dropout": dropout,
            "kernel_initializer": kernel_initializer,
            "bias_initializer": bias_initializer,
            "kernel_regularizer": kernel_regularizer,
            "bias_regularizer": bias_regularizer,
            "kernel_constraint": kernel_constraint,
            "bias_constraint": bias_constraint,
        }
        self._make_experts(experts, expert_units, describing)
        bank_arguments = {
            **{name: value for name, value in describing.items() if name != "use_bias"},
            "activate_last": True,
            "seed": derived_seed(seed, "experts"),
            "dtype": self.dtype_policy,
        }
        self.gate_hidden = self._hidden_layers_of_gates(bank_arguments)
        self._gate_argument, self.gates = gate, self._gates(gate)
        freeze_parts(self)

    def _make_experts(self, experts: Any, expert_units: Any, describing: dict[str, Any]) -> None:
        """Makes the bank that is named, or adopts what is given, which then describes itself."""
        self._experts_name = experts if isinstance(experts, str) else None
        if self._experts_name is not None:
            self.expert_units: tuple[int, ...] | None = checked_units("expert_units", expert_units)
            self.experts: Any = ExpertMLP(
                self.num_experts,
                self.expert_units,
                gated=checks.one_of("experts", experts, NAMED_EXPERTS) == "glu",
                activate_last=True,
                seed=derived_seed(self.seed, "experts"),
                dtype=self.dtype_policy,
                name="experts",
                **describing,
            )
            self._describing = self.experts.get_config()
            return
        self.expert_units = None
        refuse_descriptions(MMoE, {"expert_units": expert_units, **describing})
        self._describing = dict(describing)
        self.experts = bank_from(experts, self.num_experts, self.dtype_policy)
        adopt(self.experts, "experts")

    def _hidden_layers_of_gates(self, bank_arguments: dict[str, Any]) -> ExpertMLP | None:
        """A bank with one network per task: no dropout, and other numbers than the experts'."""
        if not self.gate_units:
            return None
        redrawn = {
            name: reseeded(keras.initializers.get(bank_arguments[name]), "gate_hidden")
            for name in ("kernel_initializer", "bias_initializer")
        }
        return ExpertMLP(
            self.num_tasks,
            self.gate_units,
            name="gate_hidden",
            **{**bank_arguments, **redrawn, "dropout": 0.0},
        )

    def _gates(self, gate: Any) -> Gate:
        sizes = (self.num_experts, self.num_tasks)
        shared: dict[str, Any] = {
            "access": self.access,
            "dropout": self.gate_dropout,
            "seed": self.seed,
            "name": "gates",
        }
        if isinstance(gate, str) and gate in _BANKS:
            return _BANKS[gate](
                *sizes,
                use_bias=self.gate_use_bias,
                kernel_initializer=self.gate_initializer,
                kernel_regularizer=self.gate_regularizer,
                **shared,
            )
        if self.gate_use_bias:
            checks.fail(
                "`gate_use_bias` must be False where `gate` is an object or a router, which brings "
                "its own: `SoftmaxGate(..., use_bias=True)`.",
                gate_use_bias=True,
            )
        if isinstance(gate, str) and gate in router_gate.NAMED:
            return RouterGate(*sizes, router=gate, **shared)
        if isinstance(gate, dict):
            gate = keras.saving.deserialize_keras_object(gate)
        if callable(gate) and not isinstance(gate, Gate):
            gate = gate(*sizes, self.access)
        if not isinstance(gate, Gate):
            names = [*_BANKS, *router_gate.NAMED]
            checks.fail(f"`gate` must be one of {names} or a `Gate`.", gate=gate)
        if self.gate_dropout:
            checks.fail(
                "`gate_dropout` must be 0 where `gate` is an object, which brings its own: "
                "`SoftmaxGate(..., dropout=0.1)`.",
                gate_dropout=self.gate_dropout,
            )
        if (gate.num_experts, gate.num_tasks) != sizes:
            checks.fail(
                f"`gate` must have num_experts={self.num_experts}, num_tasks={self.num_tasks}.",
                **{"gate.num_experts": gate.num_experts, "gate.num_tasks": gate.num_tasks},
            )
        if self.access is not None and gate.access != self.access:
            checks.fail(
                "`access` must be None where `gate` is an object, which brings its own: "
                "`SoftmaxGate(..., access=...)`.",
                access=self.access,
            )
        adopt(gate, "gates")
        return gate

    def build(self, input_shape: Shape) -> None:
        width = checks.token_shape("MMoE", tuple(input_shape))
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: width})
        self._build_parts(width)

    def _build_parts(self, width: int) -> None:
        build_once(self.experts, (1, None, width))
        self.output_width = self._width_of_outputs(width)
        if self.gate_hidden is not None:
            self.gate_hidden.build((1, None, width))
            build_once(self.gates, (self.num_tasks, None, self.gate_units[-1]))
        else:
            build_once(self.gates, (None, width))
        self._importance = RunningSums(self, "importance", (self.num_tasks, self.num_experts))
        self._entropy = RunningSums(self, "entropy", (self.num_tasks,))
        self._decisions = RunningSums(self, "decisions")

    def call(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        training: bool | None = None,
        return_routing: bool = False,
    ) -> Any:
        inputs = numerics.as_float(inputs, self.compute_dtype)
        token_axes = ops.shape(inputs)[:-1]
        token_mask = flat_mask("MMoE", inputs, mask, (-1,))
        tokens = ops.reshape(inputs, (-1, inputs.shape[-1]))
        tokens = zero_where_padded(tokens, token_mask)
        mixed, routing = self._mixed(ops.expand_dims(tokens, 0), token_mask, training)

        shape = (*token_axes, self.output_width)
        outputs = [ops.reshape(mixed[:, task], shape) for task in range(self.num_tasks)]
        if not return_routing and self.recorder is None:
            return self._by_task(outputs)
        axes = (*token_axes, self.num_tasks, self.num_experts)
        record = GateRouting(*(ops.reshape(part, axes) for part in routing))
        if self.recorder is not None:
            self.recorder(record)
        return (self._by_task(outputs), record) if return_routing else self._by_task(outputs)

    def _mixed(
        self, inputs: Tensor, mask: Tensor | None, training: bool | None
    ) -> tuple[Tensor, GateRouting]:
        """What each task takes of the experts, `(N, T, out)`, and the gates.

        Args:
            inputs: `(1, N, d)`, read by all experts and gates.
            mask: bool `(N,)`, False at padding, or None.
            training: Whether dropout and counting are on.
        """
        # (e, n, out)
        run = partial(self.experts, training=training)
        expert_outputs = self._call_experts(run, self._read_by_experts(inputs))
        gate_inputs = self._read_by_gates(inputs)
        if self.gate_hidden is not None:
            gate_inputs = self.gate_hidden(gate_inputs)
        elif gate_inputs.shape[0] == 1:
            gate_inputs = gate_inputs[0]
        routing = self.gates(gate_inputs, mask=mask, training=training)
        if self._is_counted(training):
            self._count(routing, mask)
        # The sum over experts is taken in float32 at least, (n, t, e) @ (n, e, out).
        wide = keras.backend.result_type(self.compute_dtype, "float32")
        expert_outputs = ops.cast(ops.transpose(expert_outputs, (1, 0, 2)), wide)
        with backend.current.without_autocast():
            weights = self._with_native(ops.cast(routing.weights, wide))
            mixed = ops.matmul(weights, expert_outputs)
        mixed = ops.cast(mixed, self.compute_dtype)
        if mask is not None:
            mixed = ops.where(mask[:, None, None], mixed, ops.zeros_like(mixed))
        return mixed, routing

    def _read_by_experts(self, inputs: Tensor) -> Tensor:
        """What each expert reads, `(E, N, d)`, or `(1, N, d)` for all."""
        return inputs

    def _read_by_gates(self, inputs: Tensor) -> Tensor:
        """What each gate reads, `(T, N, d)`, or `(1, N, d)` for all."""
        return inputs

    def _with_native(self, weights: Tensor) -> Tensor:
        """The weights `(N, T, E)` that experts are summed with."""
        return weights

    def _width_of_outputs(self, width: int) -> int:
        return int(self.experts.compute_output_shape((1, None, width))[-1])

    def _count(self, routing: GateRouting, mask: Tensor | None) -> None:
        entropy = numerics.entropy(routing.logits)  # (n, t)
        # A token that is not finite has no entropy: it is left out.
        is_counted = ops.all(ops.isfinite(entropy), axis=-1, keepdims=True)
        if mask is not None:
            is_counted = ops.logical_and(is_counted, mask[:, None])
        weights = ops.where(is_counted[..., None], routing.weights, 0.0)
        sums = backend.current.sum_over_replicas(
            (
                ops.sum(weights, axis=0),
                ops.sum(ops.where(is_counted, entropy, 0.0), axis=0),
                ops.sum(ops.cast(is_counted, "float32")),
            )
        )
        counters = self._importance, self._entropy, self._decisions
        for counter, values in zip(counters, sums, strict=True):
            counter.add(values)

    def running_counts(self) -> dict[str, Any]:
        """Reads what was counted in training since the last reset.

        Returns:
            A dict of float64 arrays, padding excluded: `importance (tasks, E)`, each task's gate
            weight per expert; `decisions`, the tokens or examples; `entropy (tasks,)`, the sum over
            them of each gate's entropy in nats.
        """
        check_built(self)
        return {
            "importance": self._importance.read(),
            "decisions": self._decisions.read(),
            "entropy": self._entropy.read(),
        }

    def reset_running_counts(self) -> None:
        """Starts the running counts again from 0."""
        check_built(self)
        for sums in (self._importance, self._entropy, self._decisions):
            sums.reset()

    def compute_output_shape(self, input_shape: Shape) -> Any:
        width = checks.token_shape("MMoE", tuple(input_shape))
        shape = (*tuple(input_shape)[:-1], self._width_of_outputs(width))
        return self._by_task([shape] * self.num_tasks)

    def compute_output_spec(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        training: bool | None = None,
        return_routing: bool = False,
    ) -> Any:
        if mask is not None:
            checks.mask_shape("MMoE", inputs, mask)
        width = checks.token_shape("MMoE", tuple(inputs.shape))
        leading = tuple(inputs.shape)[:-1]
        shape = (*leading, self._width_of_outputs(width))
        outputs = self._by_task(
            [keras.KerasTensor(shape, dtype=self.compute_dtype) for _ in range(self.num_tasks)]
        )
        if not return_routing:
            return outputs
        axes = (*leading, self.num_tasks, self.num_experts)
        return outputs, GateRouting(*(keras.KerasTensor(axes, dtype="float32") for _ in range(2)))

    def get_config(self) -> Config:
        config: Config = super().get_config()
        shared = (
            "activation",
            "use_bias",
            "dropout",
            "kernel_initializer",
            "bias_initializer",
            "kernel_regularizer",
            "bias_regularizer",
            "kernel_constraint",
            "bias_constraint",
        )
        is_named = isinstance(self._gate_argument, str)
        return {
            **config,
            "num_experts": self.num_experts,
            "expert_units": None if self.expert_units is None else list(self.expert_units),
            "experts": self._experts_name or config_of(self.experts),
            "tasks": self.tasks if isinstance(self.tasks, int) else list(self.tasks),
            **{name: self._describing[name] for name in shared},
            "gate": self._gate_argument if is_named else config_of(self.gates),
            "gate_units": list(self.gate_units),
            "gate_dropout": self.gate_dropout,
            "gate_use_bias": self.gate_use_bias,
            "access": None if self.access is None else [list(row) for row in self.access],
            "gate_initializer": keras.initializers.serialize(self.gate_initializer),
            "gate_regularizer": keras.regularizers.serialize(self.gate_regularizer),
            "seed": self.seed,
        }
