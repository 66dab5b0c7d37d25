"""Picture of the gate weights of tasks."""

from typing import TYPE_CHECKING

import keras
import numpy as np

from keras_moe.core.types import Data
from keras_moe.inspection.mixtures import one_layer
from keras_moe.inspection.records import GATES, Record, records_of
from keras_moe.plots._canvas import COLOURS, new_figure, numbered, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def task_gates(
    model: keras.layers.Layer, x: Data, *, layer: str | None = None, batch_size: int = 256
) -> "Figure":
    """Draws the mean gate weights of an `MMoE`: a group of bars per expert, a bar per task.

    Args:
        model: A built model with an `MMoE` layer.
        x: Its inputs, an array, or a dict or list of arrays.
        layer: Name of the layer; None where there is one only. Defaults to `None`.
        batch_size: Positive integer, examples per call of the model. Defaults to `256`.

    Returns:
        A `matplotlib.figure.Figure`; lines on the bars are quartiles over the examples.

    Raises:
        ValueError: on an unknown layer.
    """
    records = records_of(model, x, batch_size, GATES)
    gates = {key: value for key, value in records.items() if hasattr(value.layer, "num_tasks")}
    name, record = one_layer(model, gates, layer, "an `MMoE`")
    return draw_gates(name, record)


def draw_gates(name: str, record: Record) -> "Figure":
    """Draws the mean gate weights of a layer's tasks."""
    weights, tasks = record.fields["weights"], record.layer.tasks
    weights = weights.reshape(-1, *weights.shape[-2:]).astype(np.float64)  # (n, t, e)
    _, num_tasks, num_experts = weights.shape
    names = numbered(num_tasks) if isinstance(tasks, int) else [shortened(task) for task in tasks]
    figure = new_figure(max(6.0, 0.3 * num_tasks * num_experts + 2.0), 3.6)
    axis = figure.add_subplot()
    thickness = 0.8 / num_tasks
    for task, called in enumerate(names):
        mean = weights[:, task].mean(axis=0)
        low, high = np.quantile(weights[:, task], [0.25, 0.75], axis=0)
        spread = np.maximum([mean - low, high - mean], 0.0)
        places = np.arange(num_experts) + (task - (num_tasks - 1) / 2) * thickness
        colour = COLOURS[task % len(COLOURS)]
        axis.bar(
            places,
            mean,
            thickness * 0.9,
            yerr=spread,
            label=called,
            color=colour,
            capsize=2,
        )
    axis.axhline(1.0 / num_experts, color="black", linewidth=1, linestyle=":", label="equal")
    axis.set_xticks(range(num_experts), numbered(num_experts))
    axis.set_xlabel("expert")
    axis.set_ylabel("gate weight")
    axis.set_title(f"What each task takes: {shortened(name)}", parse_math=False)
    # Beside the bars, and not on them.
    legend = axis.legend(frameon=False, fontsize=9, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    for text in legend.get_texts():
        text.set_parse_math(False)
    return figure
