"""Pictures of pairs: experts with the same tokens, and slots that are alike."""

from typing import TYPE_CHECKING

import keras
import numpy as np

from keras_moe.core.types import Array, Data
from keras_moe.inspection.mixtures import named_layers, one_layer
from keras_moe.inspection.records import SPARSE, Record, records_of, takers_of
from keras_moe.plots._canvas import heat_map, new_figure, numbered, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST_INCHES = 12.0


def coactivation(
    model: keras.layers.Layer, x: Data, *, layer: str | None = None, batch_size: int = 256
) -> "Figure":
    """Draws how often two experts get the same token, of the tokens that the first one gets.

    Args:
        model: A built model with a `MoE` layer of at least two experts per token.
        x: Its inputs, an array, or a dict or list of arrays.
        layer: Name of the layer; None where there is one only. Defaults to `None`.
        batch_size: Positive integer, examples per call of the model. Defaults to `256`.

    Returns:
        A `matplotlib.figure.Figure`. Entry (i, j) is the share of expert i's tokens that expert j
        gets too; the diagonal is left out.

    Raises:
        ValueError: on an unknown layer.
    """
    records = records_of(model, x, batch_size, SPARSE)
    name, record = one_layer(model, records, layer, "a layer that sends tokens to experts")
    return draw_pairs(name, record)


def draw_pairs(name: str, record: Record) -> "Figure":
    """Draws the co-activation of a sparse layer's experts."""
    num_experts = record.layer.num_experts
    taken = takers_of(record).reshape(-1, num_experts).astype(np.float64)
    together = taken.T @ taken
    shares = together / np.maximum(np.diag(together)[:, None], 1.0)
    np.fill_diagonal(shares, np.nan)
    return _matrix(
        shares, numbered(num_experts), "share of the row's tokens", f"Together: {shortened(name)}"
    )


def slot_similarity(model: keras.layers.Layer, *, layer: str | None = None) -> "Figure":
    """Draws how alike the slots of a `SoftMoE` are: cosines of their vectors `phi`, absolute.

    Args:
        model: A built model with a `SoftMoE` layer.
        layer: Name of the layer; None where there is one only. Defaults to `None`.

    Returns:
        A `matplotlib.figure.Figure`. Slots of one expert stand together; the diagonal is left out.

    Raises:
        ValueError: on an unknown layer.
    """
    soft = {
        name: mixture
        for name, mixture in named_layers(model)
        if hasattr(mixture, "slot_cosines") and mixture.slot_cosines() is not None
    }
    return draw_slots(*one_layer(model, soft, layer, "a `SoftMoE` that scores its slots"))


def draw_slots(name: str, layer: keras.layers.Layer) -> "Figure":
    """Draws how alike the slots of a soft layer are."""
    cosines = layer.slot_cosines()
    np.fill_diagonal(cosines, np.nan)
    per_expert = layer.slots_per_expert
    slots = [f"{slot // per_expert}.{slot % per_expert}" for slot in range(len(cosines))]
    return _matrix(cosines, slots, "absolute cosine", f"Slots (expert.slot): {shortened(name)}")


def _matrix(values: Array, names: list[str], unit: str, title: str) -> "Figure":
    size = min(max(5.0, 0.28 * len(names) + 1.5), _MOST_INCHES)
    figure = new_figure(size + 1.2, size)
    axis = figure.add_subplot()
    heat_map(figure, axis, values, names, names, unit)
    axis.set_title(title, parse_math=False)
    return figure
