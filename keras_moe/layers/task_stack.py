"""Levels of experts, one on another."""

import inspect
from collections.abc import Sequence
from typing import Any

import keras
from keras import ops

from keras_moe.core import checks, numerics
from keras_moe.core.arguments import KeepsArguments
from keras_moe.core.initializers import derived_seed, reseeded
from keras_moe.core.records import GateRouting
from keras_moe.core.types import Config, Shape, Tensor
from keras_moe.layers.expert_mlp import checked_units
from keras_moe.layers.freezing import FreezesParts, freeze_parts
from keras_moe.layers.mmoe import MMoE
from keras_moe.layers.sublayers import config_of, name_or_default
from keras_moe.layers.task_level import InnerLevel
from keras_moe.layers.tasks import GivesByTask
from keras_moe.layers.tokens import flat_mask, zero_where_padded
from keras_moe.routers.gates import Gate

_DEFAULTS = inspect.signature(MMoE.__init__).parameters
# Arguments of a level: those of `MMoE` that describe experts and gates.
_OF_A_LEVEL = frozenset(_DEFAULTS) - {
    "self",
    "num_experts",
    "expert_units",
    "tasks",
    "access",
    "seed",
    "name",
    "kwargs",
}
_INITIALIZERS = ("kernel_initializer", "bias_initializer", "gate_initializer")


class TaskStack(FreezesParts, GivesByTask, KeepsArguments):
    """Base of stacks of levels, `PLE` and `AdaTT`: each task's output of a level is its next input.

    Args:
        expert_units: The widths of the experts' layers, the same on every level, or a sequence of
            such for each level.
        tasks: Positive integer, for a list of outputs, or a sequence of names, for a dict.
        num_task_experts: Positive integer, the experts of each task on each level.
        num_shared_experts: Integer of at least 0, the shared experts on each level.
        num_levels: Positive integer; None for as many as `expert_units` has sequences.
        seed: Optional integer, of which each level derives its own.
        **kwargs: Arguments of `MMoE` for every level, and of a Keras layer.
    """

    _level: type[InnerLevel] = InnerLevel

    def __init__(
        self,
        expert_units: int | Sequence[int] | Sequence[Sequence[int]],
        tasks: int | Sequence[str],
        num_task_experts: int,
        num_shared_experts: int,
        num_levels: int | None,
        *,
        seed: int | None = None,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        for_levels = {key: kwargs.pop(key) for key in list(kwargs) if key in _OF_A_LEVEL}
        if isinstance(for_levels.get("gate"), Gate):
            checks.fail(
                "`gate` must be a name or a function that makes one: levels differ in size.",
                gate=for_levels["gate"],
            )
        super().__init__(name=name_or_default(name, type(self).__name__.lower()), **kwargs)
        self.supports_masking = True
        self.expert_units = _units_by_level(expert_units, num_levels)
        self.num_levels = len(self.expert_units)
        self.seed = checks.optional(checks.integer, "seed", seed)
        self._for_levels = for_levels
        self.parts = tuple(f"level_{level}" for level in range(self.num_levels))
        for level, part in enumerate(self.parts):
            made = self._make_level(level, tasks, num_task_experts, num_shared_experts)
            setattr(self, part, made)
        self.tasks, self.num_tasks = self.levels[-1].tasks, self.levels[-1].num_tasks
        self.num_task_experts = self.levels[-1].num_task_experts
        self.num_shared_experts = self.levels[-1].num_shared_experts
        freeze_parts(self)

    @property
    def levels(self) -> list[InnerLevel]:
        """The levels, in the order in which data meets them."""
        return [getattr(self, part) for part in self.parts]

    def _make_level(
        self, level: int, tasks: Any, num_task_experts: int, num_shared_experts: int
    ) -> InnerLevel:
        arguments = dict(self._for_levels)
        is_named = isinstance(arguments.get("experts", "mlp"), str)
        for name in _INITIALIZERS:
            if is_named or name == "gate_initializer":
                given = arguments.get(name, _DEFAULTS[name].default)
                arguments[name] = reseeded(keras.initializers.get(given), f"level_{level}")
        is_last = level == self.num_levels - 1
        return self._level(
            self.expert_units[level],
            tasks,
            num_task_experts,
            num_shared_experts,
            has_shared_gate=not is_last and num_shared_experts > 0,
            seed=derived_seed(self.seed, "level", level),
            name=self.parts[level],
            dtype=self.dtype_policy,
            **arguments,
        )

    def build(self, input_shape: Shape) -> None:
        width = checks.token_shape(type(self).__name__, tuple(input_shape))
        self.input_spec = keras.layers.InputSpec(min_ndim=2, axes={-1: width})
        shape = (1, None, width)
        for level in self.levels:
            level.build(shape)
            shape = (level.num_tasks, None, level.output_width)

    def call(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        training: bool | None = None,
        return_routing: bool = False,
    ) -> Any:
        inputs = numerics.as_float(inputs, self.compute_dtype)
        token_axes = ops.shape(inputs)[:-1]
        token_mask = flat_mask(type(self).__name__, inputs, mask, (-1,))
        tokens = ops.reshape(inputs, (-1, inputs.shape[-1]))
        units = ops.expand_dims(zero_where_padded(tokens, token_mask), 0)
        records = []
        for level in self.levels:
            units, routing = level(units, mask=token_mask, training=training, return_routing=True)
            axes = (*token_axes, level.num_tasks, level.num_experts)
            records.append(GateRouting(*(ops.reshape(part, axes) for part in routing)))
        shape = (*token_axes, self.levels[-1].output_width)
        outputs = self._by_task([ops.reshape(units[task], shape) for task in range(self.num_tasks)])
        return (outputs, records) if return_routing else outputs

    def get_config(self) -> Config:
        config: Config = super().get_config()
        first = self.levels[0].get_config()
        of_a_level = {name: first[name] for name in _OF_A_LEVEL}
        given = {
            name: self._for_levels.get(name, _DEFAULTS[name].default)
            for name in (*_INITIALIZERS, "gate", "experts")
        }
        for name in _INITIALIZERS:  # names where experts are layers, which leave them out
            if not isinstance(given[name], str):
                given[name] = keras.initializers.serialize(keras.initializers.get(given[name]))
        if not isinstance(given["gate"], str):
            given["gate"] = keras.saving.serialize_keras_object(given["gate"])
        if isinstance(given["experts"], keras.layers.Layer):
            given["experts"] = config_of(given["experts"])
        return {
            **config,
            **of_a_level,
            **given,
            "expert_units": [
                units if units is None else list(units) for units in self.expert_units
            ],
            "tasks": self.tasks if isinstance(self.tasks, int) else list(self.tasks),
            "num_task_experts": self.num_task_experts,
            "num_shared_experts": self.num_shared_experts,
            "num_levels": self.num_levels,
            "seed": self.seed,
        }


def _units_by_level(units: Any, num_levels: int | None) -> tuple[tuple[int, ...] | None, ...]:
    """The widths of each level's experts, None where they are Keras layers."""
    if isinstance(units, Sequence) and units and all(each is None for each in units):
        units, num_levels = None, len(units)  # from a config
    by_level = isinstance(units, Sequence) and any(isinstance(each, Sequence) for each in units)
    if num_levels is None:
        num_levels = len(units) if by_level else 2
    checks.positive_int("num_levels", num_levels)
    if units is None:
        return (None,) * num_levels
    if not by_level:
        return (checked_units("expert_units", units),) * num_levels
    if len(units) != num_levels:
        checks.fail(
            f"`expert_units` must be one sequence of widths, or num_levels={num_levels} of them.",
            expert_units=units,
        )
    return tuple(checked_units("expert_units", each) for each in units)
