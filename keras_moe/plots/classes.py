"""Picture of the classes that use each expert."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from keras_moe.core import checks
from keras_moe.core.types import Array, Data
from keras_moe.inspection.mixtures import one_layer
from keras_moe.inspection.records import (
    GATES,
    SOFT,
    SPARSE,
    Record,
    check_by_example,
    records_of,
    used_by_example,
)
from keras_moe.plots._canvas import heat_map, new_figure, numbered, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def class_by_expert(
    model: keras.layers.Layer,
    x: Data,
    y: Any,
    *,
    layer: str | None = None,
    class_names: Sequence[str] | None = None,
    batch_size: int = 256,
) -> "Figure":
    """Draws where the tokens of each class go: classes down, experts across, rows that sum to 1.

    For `SoftMoE` a share is of the combine weight of the class's tokens; for `MMoE`, of the gate
    weight of its examples.

    Args:
        model: A built model with a mixture layer.
        x: Its inputs, an array, or a dict or list of arrays.
        y: Integer class of each example, `(examples,)`.
        layer: Name of the layer; None where there is one only. Defaults to `None`.
        class_names: Names of the classes 0, 1, ...; None for numbers. Defaults to `None`.
        batch_size: Positive integer, examples per call of the model. Defaults to `256`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: on an unknown layer, one whose inputs have other things than the examples on
            their first axis, or labels that are not one integer per example.
    """
    records = records_of(model, x, batch_size, SPARSE, SOFT, GATES)
    name, record = one_layer(model, records, layer, "a mixture layer")
    check_by_example(name, record, x)
    used = used_by_example(record)
    labels = np.asarray(y).reshape(-1)
    if len(labels) != len(used) or not np.issubdtype(labels.dtype, np.integer):
        checks.fail(
            f"`y` must have one integer class for each of {len(used)} examples.",
            shape=np.asarray(y).shape,
        )
    classes = list(range(labels.max() + 1 if class_names is None else len(class_names)))
    rows = numbered(len(classes)) if class_names is None else list(class_names)
    by_class = np.array([used[labels == label].sum(axis=0) for label in classes])
    return draw_classes(name, by_class, rows, unit_of(record))


def unit_of(record: Record) -> str:
    """The unit of a class's shares."""
    return "share of the class's " + ("tokens" if "experts" in record.fields else "weight")


def draw_classes(name: str, by_class: Array, rows: list[str], unit: str) -> "Figure":
    """Draws the use of experts `(classes, E)`, in shares of each class."""
    shares = by_class / np.maximum(by_class.sum(axis=1, keepdims=True), 1e-12)
    num_experts = shares.shape[-1]
    figure = new_figure(min(max(6.0, 0.45 * num_experts + 3.0), 14.0), 0.35 * len(rows) + 1.8)
    axis = figure.add_subplot()
    heat_map(figure, axis, shares, rows, numbered(num_experts), unit)
    axis.set_xlabel("expert")
    axis.set_title(f"Who uses which expert: {shortened(name)}", parse_math=False)
    return figure
