"""One level of experts that belong to tasks, or to all of them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from keras import ops

from keras_moe.core import checks
from keras_moe.core.types import Shape, Tensor
from keras_moe.layers.mmoe import MMoE
from keras_moe.layers.tasks import checked_tasks

SHARED = "shared"


class TaskLevel(MMoE):
    """Base of layers whose experts are a task's own or shared: `CGC`, and levels of `PLE`, `AdaTT`.

    A unit is a task, or what is shared. Experts stand in the order of the tasks, `num_task_experts`
    each, and the shared ones last. On the first level all units read the same; on others a unit's
    experts and gate read what its gate gave on the level before.

    Args:
        expert_units: Positive integer or a sequence of them, the width of each expert layer, or
            None where `experts` are Keras layers.
        tasks: Positive integer, or a sequence of names.
        num_task_experts: Positive integer, the experts of each task.
        num_shared_experts: Integer of at least 0, the experts that all tasks share.
        has_shared_gate: Whether there is a gate of what is shared, behind those of the tasks.
        takes_all: Whether tasks take other tasks' experts too.
        **kwargs: Arguments of `MMoE` besides `num_experts` and `access`.
    """

    def __init__(
        self,
        expert_units: int | Sequence[int] | None,
        tasks: int | Sequence[str],
        num_task_experts: int,
        num_shared_experts: int,
        *,
        has_shared_gate: bool,
        takes_all: bool = False,
        **kwargs: Any,
    ) -> None:
        own = checks.positive_int("num_task_experts", num_task_experts)
        shared = checks.int_at_least("num_shared_experts", num_shared_experts, 0)
        for name in ("num_experts", "access"):
            if name in kwargs:
                checks.fail(
                    f"`{type(self).__name__}` has no use for `{name}`: `num_task_experts` and "
                    "`num_shared_experts` say it.",
                    **{name: kwargs[name]},
                )
        tasks = checked_tasks(tasks)
        count = tasks if isinstance(tasks, int) else len(tasks)
        unit_of = np.repeat(np.arange(count + 1), [own] * count + [shared])
        self._unit_of_expert = tuple(map(int, unit_of))
        self._has_shared_gate = has_shared_gate
        gates = np.arange(count + has_shared_gate)[:, None]
        # What is shared takes all; a task its own and what is shared.
        mask = takes_all | (unit_of == gates) | (unit_of == count) | (gates == count)
        super().__init__(
            len(unit_of),
            expert_units,
            _with_shared(tasks) if has_shared_gate else tasks,
            access=None if mask.all() else mask.tolist(),
            **kwargs,
        )
        self.num_task_experts, self.num_shared_experts = own, shared

    def _read_by_experts(self, inputs: Tensor) -> Tensor:
        if inputs.shape[0] == 1:
            return inputs
        return ops.take(inputs, np.array(self._unit_of_expert, "int32"), axis=0)

    def _read_by_gates(self, inputs: Tensor) -> Tensor:
        return inputs if inputs.shape[0] == 1 else inputs[: self.num_tasks]


class InnerLevel(TaskLevel):
    """A level inside of a stack: from what each unit reads to what each gate gives.

    Call arguments:
        inputs: `(U, N, d)`, or `(1, N, d)` on the first level.
        mask: Optional bool `(N,)`, False at padding, whose outputs are 0.
        training: Whether dropout and counting are on.
        return_routing: Whether to return the gates too.

    Returns:
        `(gates, N, width)`, and the `GateRouting` with `return_routing=True`.
    """

    def build(self, input_shape: Shape) -> None:
        self._build_parts(checks.token_shape("TaskLevel", tuple(input_shape), min_rank=3))

    def call(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        training: bool | None = None,
        return_routing: bool = False,
    ) -> Any:
        mixed, routing = self._mixed(inputs, mask, training)
        if self.recorder is not None:
            self.recorder(routing)
        outputs = ops.transpose(mixed, (1, 0, 2))
        return (outputs, routing) if return_routing else outputs

    def compute_mask(self, inputs: Tensor, previous_mask: Tensor | None = None) -> None:
        """A mask of rows is the stack's to hand on."""
        return


def _with_shared(tasks: int | Sequence[str]) -> int | Sequence[str]:
    if isinstance(tasks, int):
        return tasks + 1
    if SHARED in tasks:
        checks.fail(f"`tasks` must not hold {SHARED!r}, the name of what is shared.", tasks=tasks)
    return [*tasks, SHARED]
