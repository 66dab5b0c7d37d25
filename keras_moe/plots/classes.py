"""Which classes an expert is used by."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from keras_moe import _checks
from keras_moe.plots._canvas import heat_map, new_figure, numbered
from keras_moe.plots._records import named_layers, one_layer, records_of, takers_of


def class_by_expert(
    model: Any,
    x: Any,
    y: Any,
    *,
    layer: str | None = None,
    class_names: Sequence[str] | None = None,
    batch_size: int = 256,
) -> Any:
    """Draws where the tokens of each class go: classes down, experts across, rows that sum to 1.

    Args:
        model: A built model with a `MoE` or `SwitchFFN` layer.
        x: Its inputs, an array or a dict of arrays.
        y: Integer class of each example, `(examples,)`.
        layer: Name of the layer; None where there is one only. Defaults to `None`.
        class_names: Names of the classes 0, 1, ...; None for numbers. Defaults to `None`.
        batch_size: Positive integer, examples per call of the model. Defaults to `256`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: on an unknown layer, or labels that are not one integer per example.
    """
    found = records_of(model, x, batch_size, ("experts", "kept"))
    name, record = one_layer(found, layer, "a layer that sends tokens to experts")
    num_experts = dict(named_layers(model))[name].num_experts
    taken = takers_of(record, num_experts)
    labels = np.asarray(y).reshape(-1)
    if len(labels) != len(taken) or not np.issubdtype(labels.dtype, np.integer):
        _checks.fail(
            f"`y` must have one integer class for each of {len(taken)} examples.",
            shape=np.asarray(y).shape,
        )
    taken = taken.reshape(len(taken), -1, num_experts).sum(axis=1)
    classes = list(range(labels.max() + 1 if class_names is None else len(class_names)))
    used = np.array([taken[labels == each].sum(axis=0) for each in classes], dtype=np.float64)
    shares = used / np.maximum(used.sum(axis=1, keepdims=True), 1e-12)
    rows = numbered(len(classes)) if class_names is None else list(class_names)
    figure = new_figure(max(6.0, 0.45 * num_experts + 3.0), 0.35 * len(rows) + 1.8)
    axis = figure.add_subplot()
    heat_map(figure, axis, shares, rows, numbered(num_experts), "share of the class's tokens")
    axis.set_xlabel("expert")
    axis.set_title(f"Who uses which expert: {name}")
    return figure
