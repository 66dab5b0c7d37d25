"""Adaptive task-to-task fusion."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe.core.initializers import derived_seed
from keras_moe.core.types import Tensor
from keras_moe.layers.task_level import InnerLevel
from keras_moe.layers.task_stack import TaskStack


class _Fusion(InnerLevel):
    """A level whose gates mix all experts, with a residual of each unit's own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, takes_all=True, **kwargs)

    @property
    def _has_unit_residual(self) -> bool:
        """Whether every unit has one expert, whose weight is then 1."""
        return self.num_task_experts == 1 and self.num_shared_experts in (0, 1)

    def _build_parts(self, width: int) -> None:
        super()._build_parts(width)
        self.native, self.shared_native = None, None
        if self._has_unit_residual:
            return
        own, shared = self.num_task_experts, self.num_shared_experts
        tasks = self.num_tasks - self._has_shared_gate
        self.native = self.add_weight(
            name="native", shape=(tasks, own), initializer=_uniform(own, self.seed, "native")
        )
        if self._has_shared_gate:
            self.shared_native = self.add_weight(
                name="shared_native",
                shape=(1, shared),
                initializer=_uniform(shared, self.seed, "shared"),
            )

    def _with_native(self, weights: Tensor) -> Tensor:
        return weights + ops.cast(self._native_weights(), weights.dtype)

    def _native_weights(self) -> Tensor:
        """The residual's weights, `(gates, E)`: 0 for the experts of other units."""
        unit_of = np.array(self._unit_of_expert)
        is_own = (unit_of == np.arange(self.num_tasks)[:, None]).astype("float32")
        if self.native is None:
            return ops.convert_to_tensor(is_own)
        tasks = self.native.shape[0]
        rows = [ops.tile(ops.convert_to_tensor(self.native.value), (1, tasks))]
        if self.num_shared_experts:
            rows = [ops.pad(rows[0], ((0, 0), (0, self.num_shared_experts)))]
        if self.shared_native is not None:
            own = tasks * self.num_task_experts
            rows.append(
                ops.pad(ops.convert_to_tensor(self.shared_native.value), ((0, 0), (own, 0)))
            )
        return ops.concatenate(rows, axis=0) * ops.convert_to_tensor(is_own)


@keras.saving.register_keras_serializable(package="keras_moe")
class AdaTT(TaskStack):
    """Fuses, on every level, all tasks' experts, and adds a residual of a task's own.

    y_t = sum_e softmax(x_t @ kernel[t] + bias[t])_e * expert_e(x of e's unit)
          + sum_{e of t} native[t,e] * expert_e(x_t)
    A task's experts and gate read what it got on the level before. Shared experts, where there are
    some, are one more unit, which has a gate and a residual too, except on the last level.

    Where every unit has one expert, `native` is 1 and no weight, as in the authors' code. Elsewhere
    it is trained, from a uniform distribution within 1 / sqrt(the unit's experts), as there; the
    paper says that it is trained and not how it begins.

    Args:
        expert_units: Positive integer or a sequence of them, the width of each expert layer on
            every level, or one such sequence for each level.
        tasks: Positive integer, for a list of outputs, or a sequence of names, for a dict.
        num_task_experts: Positive integer, the experts of each task on each level. Defaults to `1`.
        num_shared_experts: Integer of at least 0, the shared experts on each level. Defaults to
            `0` (AdaTT-sp).
        num_levels: Positive integer, or None for 2, or for as many as `expert_units` has sequences.
            Defaults to `None`.
        gate_use_bias: Whether each gate has a bias per expert. Defaults to `None`: as the authors',
            which have one, where `gate` is "softmax" or "sigmoid".
        seed: Optional integer, of which each level derives its own. Defaults to `None`.
        **kwargs: The other arguments of `MMoE`, for every level: `activation`, `use_bias`,
            `dropout`, `gate` (a name, or a function of the experts E, the gates and their access
            that makes one), `gate_units`, `gate_dropout`, initializers, regularizers and
            constraints.

    Call arguments:
        inputs: `(..., d)` of rank 2 or more.
        mask: Optional bool `(...)`, False at padding, whose outputs are 0.
        training: Whether dropout and counting are on.
        return_routing: Whether to return the gates too, without the residuals. Defaults to `False`.

    Input shape:
        `(batch, ..., d)`

    Output shape:
        `(batch, ..., last width)` for each task.

    Returns:
        A list of outputs, one per task, or a dict where `tasks` are names; with
        `return_routing=True` also a list of `keras_moe.GateRouting`, one per level,
        `(batch, ..., gates, E)`.

    Raises:
        ValueError: as `MMoE`, and on widths that are not one sequence or one per level.

    Example:

    >>> import numpy as np
    >>> from keras_moe import layers
    >>> layer = layers.AdaTT([[64], [32]], ["click", "like"], num_task_experts=2)
    >>> outputs = layer(np.zeros((4, 16), "float32"))
    >>> {task: tuple(output.shape) for task, output in outputs.items()}
    {'click': (4, 32), 'like': (4, 32)}

    Reference:
        Li et al. 2023, "AdaTT: Adaptive Task-to-Task Fusion Network for Multitask Learning in
        Recommendations", section 3, and its authors' code.
    """

    _level = _Fusion

    def __init__(
        self,
        expert_units: int | Sequence[int] | Sequence[Sequence[int]],
        tasks: int | Sequence[str],
        num_task_experts: int = 1,
        num_shared_experts: int = 0,
        num_levels: int | None = None,
        *,
        gate_use_bias: bool | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        if gate_use_bias is None:
            gate_use_bias = kwargs.get("gate", "softmax") in ("softmax", "sigmoid")
        super().__init__(
            expert_units,
            tasks,
            num_task_experts,
            num_shared_experts,
            num_levels,
            gate_use_bias=gate_use_bias,
            seed=seed,
            **kwargs,
        )


def _uniform(experts: int, seed: int | None, purpose: str) -> keras.initializers.Initializer:
    bound = experts**-0.5
    return keras.initializers.RandomUniform(-bound, bound, seed=derived_seed(seed, purpose))
