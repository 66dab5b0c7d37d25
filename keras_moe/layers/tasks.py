"""Tasks of a multi-gate layer, and the experts that each may take."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from keras_moe.core import checks
from keras_moe.core.types import Tensor
from keras_moe.routers.gates import checked_access


class GivesByTask(keras.layers.Layer):
    """Base of layers with an output for each task: a list, or a dict where tasks have names."""

    tasks: int | tuple[str, ...]
    num_tasks: int

    def _by_task(self, outputs: list[Any]) -> list[Any] | dict[str, Any]:
        if isinstance(self.tasks, int):
            return outputs
        return dict(zip(self.tasks, outputs, strict=True))

    def compute_mask(self, inputs: Tensor, previous_mask: Tensor | None = None) -> Any:
        """Every task's output keeps the mask of the inputs."""
        if previous_mask is None:
            return None
        return self._by_task([previous_mask] * self.num_tasks)


def access_of(
    access: Any, tasks: int | tuple[str, ...], num_tasks: int, num_experts: int
) -> tuple[tuple[bool, ...], ...] | None:
    """Which experts each task may take, from a mask or from the experts' numbers by task."""
    if not isinstance(access, Mapping):
        return checked_access(access, num_tasks, num_experts)
    if isinstance(tasks, int) or set(access) != set(tasks):
        checks.fail(f"`access` must be a dict of the tasks, {tasks!r}, or a mask.", access=access)
    for task, experts in access.items():
        is_known = isinstance(experts, Sequence) and all(
            isinstance(expert, int) and 0 <= expert < num_experts for expert in experts
        )
        if not is_known:
            checks.fail(
                f"`access[{task!r}]` must be numbers of experts, from 0 to {num_experts - 1}.",
                access=access,
            )
    mask = [[expert in access[task] for expert in range(num_experts)] for task in tasks]
    return checked_access(mask, num_tasks, num_experts)


def checked_tasks(tasks: Any) -> int | tuple[str, ...]:
    """Returns a number of tasks, or their names as a tuple."""
    is_count = isinstance(tasks, int) and not isinstance(tasks, bool) and tasks > 0
    if is_count:
        return int(tasks)
    names = tuple(tasks) if isinstance(tasks, list | tuple) else ()
    is_named = bool(names) and all(isinstance(name, str) and name for name in names)
    if not is_named or len(set(names)) != len(names):
        checks.fail(
            "`tasks` must be a positive integer or a sequence of distinct names.", tasks=tasks
        )
    return names
