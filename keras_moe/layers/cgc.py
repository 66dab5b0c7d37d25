"""Customized gate control: experts of each task's own, and shared ones."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_moe.core.types import Config
from keras_moe.layers.sublayers import name_or_default
from keras_moe.layers.task_level import TaskLevel


@keras.saving.register_keras_serializable(package="keras_moe")
class CGC(TaskLevel):
    """Mixes, for each task, experts of its own with experts that all tasks share.

    gates[n,t,:] = softmax over the task's own and the shared experts of x[n,:] @ kernel[t]
    y_t[n,:]     = sum_e gates[n,t,e] * expert_e(x[n,:])
    It is `MMoE` in which a task takes nothing of other tasks' experts. Experts stand task by task,
    the shared ones last: with two tasks, `num_task_experts=2` and `num_shared_experts=1`, experts
    0 and 1 are the first task's, 2 and 3 the second's, and 4 is shared.

    Args:
        expert_units: Positive integer or a sequence of them, the width of each expert layer. Only
            `None` where `experts` are Keras layers.
        tasks: Positive integer, for a list of outputs, or a sequence of names, for a dict.
        num_task_experts: Positive integer, the experts of each task. Defaults to `1`.
        num_shared_experts: Integer of at least 0, the experts that all tasks share. Defaults to
            `1`.
        shared_output: Whether there is one more output, last in the list or "shared" in the dict,
            which a gate of its own mixes of all experts. Defaults to `False`.
        **kwargs: The other arguments of `MMoE`, except `num_experts` and `access`.

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
        ValueError: as `MMoE`, and on numbers of experts that are negative.

    Example:

    >>> import numpy as np
    >>> from keras_moe import layers
    >>> layer = layers.CGC([64, 32], ["click", "like"], num_task_experts=2, num_shared_experts=1)
    >>> outputs = layer(np.zeros((4, 16), "float32"))
    >>> {task: tuple(output.shape) for task, output in outputs.items()}
    {'click': (4, 32), 'like': (4, 32)}

    Reference:
        Tang et al. 2020, "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model
        for Personalized Recommendations", section 4.1, equations 1 to 4.
    """

    def __init__(
        self,
        expert_units: int | Sequence[int] | None,
        tasks: int | Sequence[str],
        num_task_experts: int = 1,
        num_shared_experts: int = 1,
        *,
        shared_output: bool = False,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            expert_units,
            tasks,
            num_task_experts,
            num_shared_experts,
            has_shared_gate=bool(shared_output),
            name=name_or_default(name, "cgc"),
            **kwargs,
        )
        self.shared_output = bool(shared_output)

    def get_config(self) -> Config:
        config = super().get_config()
        del config["num_experts"], config["access"]
        tasks = config["tasks"]
        if self.shared_output:
            tasks = tasks - 1 if isinstance(tasks, int) else tasks[:-1]
        return {
            **config,
            "tasks": tasks,
            "num_task_experts": self.num_task_experts,
            "num_shared_experts": self.num_shared_experts,
            "shared_output": self.shared_output,
        }
