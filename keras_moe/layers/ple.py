"""Progressive layered extraction."""

from collections.abc import Sequence
from typing import Any

import keras

from keras_moe.layers.task_stack import TaskStack


@keras.saving.register_keras_serializable(package="keras_moe")
class PLE(TaskStack):
    """Stacks levels of `CGC`: each task's experts, and shared ones, separate step by step.

    On every level, task t's gate mixes its own and the shared experts, and a gate of what is shared
    mixes all of them:
    y_t = sum_{e of t or shared} softmax(x_t @ kernel[t])_e * expert_e(x of e's unit)
    A task's experts and gate read what its gate gave on the level before, shared ones what the
    shared gate gave. The last level has no shared gate. On the first level all read the inputs.

    Args:
        expert_units: Positive integer or a sequence of them, the width of each expert layer on
            every level, or one such sequence for each level.
        tasks: Positive integer, for a list of outputs, or a sequence of names, for a dict.
        num_task_experts: Positive integer, the experts of each task on each level. Defaults to `1`.
        num_shared_experts: Positive integer, the shared experts on each level. Defaults to `1`.
        num_levels: Positive integer, or None for 2, or for as many as `expert_units` has sequences.
            Defaults to `None`.
        seed: Optional integer, of which each level derives its own. Defaults to `None`.
        **kwargs: The other arguments of `MMoE`, for every level: `activation`, `use_bias`,
            `dropout`, `gate` (a name, or a function of the experts E, the gates and their access
            that makes one, since levels differ in size), `gate_units`, `gate_dropout`,
            `gate_use_bias`, initializers, regularizers and constraints.

    Call arguments:
        inputs: `(..., d)` of rank 2 or more.
        mask: Optional bool `(...)`, False at padding, whose outputs are 0.
        training: Whether dropout and counting are on.
        return_routing: Whether to return the gates too. Defaults to `False`.

    Input shape:
        `(batch, ..., d)`

    Output shape:
        `(batch, ..., last width)` for each task.

    Returns:
        A list of outputs, one per task, or a dict where `tasks` are names; with
        `return_routing=True` also a list of `keras_moe.GateRouting`, one per level,
        `(batch, ..., gates, E)`, of which the last gate is the shared one where there is one.

    Raises:
        ValueError: as `MMoE`, and on widths that are not one sequence or one per level.

    Example:

    >>> import numpy as np
    >>> from keras_moe import layers
    >>> layer = layers.PLE([32], ["click", "like"], num_task_experts=2, num_levels=2)
    >>> outputs = layer(np.zeros((4, 16), "float32"))
    >>> {task: tuple(output.shape) for task, output in outputs.items()}
    {'click': (4, 32), 'like': (4, 32)}

    Reference:
        Tang et al. 2020, "Progressive Layered Extraction (PLE): A Novel Multi-Task Learning Model
        for Personalized Recommendations", section 4.2, equations 5 to 7.
    """

    def __init__(
        self,
        expert_units: int | Sequence[int] | Sequence[Sequence[int]],
        tasks: int | Sequence[str],
        num_task_experts: int = 1,
        num_shared_experts: int = 1,
        num_levels: int | None = None,
        *,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            expert_units,
            tasks,
            num_task_experts,
            num_shared_experts,
            num_levels,
            seed=seed,
            **kwargs,
        )
