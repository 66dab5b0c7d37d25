"""Figures, the same look for all, without pyplot and its global state."""

from typing import Any

import numpy as np

from keras_moe import _checks
from keras_moe._mixtures import mixture_layers, unique_names
from keras_moe.recording import record_routing

# Perceptually even, and told apart by the colour-blind and in grey.
AMOUNT = "cividis"
# Okabe and Ito's colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
_MOST_LABELS = 32


def new_figure(width: float, height: float) -> Any:
    """A figure that belongs to no window."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "`keras_moe.plots` needs matplotlib: pip install 'keras-moe[plot]'"
        ) from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def heat_map(
    figure: Any,
    axis: Any,
    values: Any,
    rows: list[str],
    columns: list[str],
    unit: str,
    most: float | None = None,
) -> None:
    """Draws a matrix with named rows and columns and a colour bar; numbers where they fit."""
    values = np.asarray(values, dtype=np.float64)
    image = axis.imshow(values, cmap=AMOUNT, aspect="auto", vmin=0.0, vmax=most)
    _label(axis.xaxis, columns)
    _label(axis.yaxis, rows)
    if values.shape[1] <= 10 and values.shape[0] <= 14:
        middle = np.nanmax(values) / 2 if most is None else most / 2
        for (row, column), value in np.ndenumerate(values):
            colour = "black" if value > middle else "white"
            text = f"{value:.2f}"
            axis.text(column, row, text, ha="center", va="center", color=colour, fontsize=8)
    figure.colorbar(image, ax=axis, label=unit)


def _label(axis: Any, names: list[str]) -> None:
    step = -(-len(names) // _MOST_LABELS)
    places = list(range(0, len(names), step))
    axis.set_ticks(places, [names[place] for place in places])


def numbered(count: int) -> list[str]:
    """Experts' names on an axis."""
    return [str(number) for number in range(count)]


def records_of(model: Any, x: Any, batch_size: int, fields: tuple[str, ...]) -> dict[str, Any]:
    """What the mixture layers that give `fields` decide about `x`, batches joined.

    Returns:
        By layer name, a dict of arrays by field. Only what is asked for is kept of a batch.
    """
    parts: dict[str, dict[str, list[Any]]] = {}
    total = len(next(iter(x.values())) if isinstance(x, dict) else x)
    for start in range(0, total, batch_size):
        stop = start + batch_size
        if isinstance(x, dict):
            batch: Any = {name: each[start:stop] for name, each in x.items()}
        else:
            batch = x[start:stop]
        with record_routing(model) as records:
            model(batch, training=False)
        for name, calls in records.items():
            for record in calls:
                if all(hasattr(record, field) for field in fields):
                    found = parts.setdefault(name, {field: [] for field in fields})
                    for field in fields:
                        found[field].append(getattr(record, field))
    return {
        name: {field: np.concatenate(arrays) for field, arrays in found.items()}
        for name, found in parts.items()
    }


def one_layer(by_layer: dict[str, Any], layer: str | None, kind: str) -> tuple[str, Any]:
    """The named layer's entry, or the only one.

    Raises:
        ValueError: where there is none, or several and no name.
    """
    if layer is None and len(by_layer) == 1:
        return next(iter(by_layer.items()))
    if layer not in by_layer:
        _checks.fail(f"`layer` must name {kind}: one of {sorted(by_layer)}.", layer=layer)
    return str(layer), by_layer[str(layer)]


def named_layers(model: Any) -> list[tuple[str, Any]]:
    """The mixture layers of a model by name."""
    return unique_names(mixture_layers(model))


def takers_of(record: dict[str, Any], num_experts: int) -> Any:
    """Which experts of a sparse layer take a token, bool `(..., E)`: none that dropped it."""
    chosen = record["experts"][..., None] == np.arange(num_experts)
    return (chosen & record["kept"][..., None]).any(axis=-2)
