"""Pictures of the load of experts."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

import keras
import numpy as np

from keras_moe.core import checks
from keras_moe.core.types import Array, Data
from keras_moe.inspection.records import SPARSE, records_of, takers_of
from keras_moe.plots._canvas import heat_map, new_figure, numbered, shortened

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def expert_load(model: keras.layers.Layer, x: Data, *, batch_size: int = 256) -> "Figure":
    """Draws each sparse layer's load on some data: layers down, experts across, 1 for a fair share.

    Args:
        model: A built model with `MoE` or `SwitchFFN` layers.
        x: Its inputs, an array, or a dict or list of arrays.
        batch_size: Positive integer, examples per call of the model. Defaults to `256`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: where no layer sends tokens to experts.
    """
    shares = {}
    for name, record in records_of(model, x, batch_size, SPARSE).items():
        taken = takers_of(record).reshape(-1, record.layer.num_experts)
        shares[name] = taken.mean(axis=0) / max(taken.mean(), 1e-12)
    if not shares:
        checks.fail("`model` must have a layer that sends tokens to experts.", model=model.name)
    return draw_load(shares, "load over the mean")


def draw_load(shares: dict[str, Array], unit: str) -> "Figure":
    """Draws each layer's shares of its experts, 1 for a fair one."""
    most = max(len(row) for row in shares.values())
    values = np.full((len(shares), most), np.nan)
    for index, row in enumerate(shares.values()):
        values[index, : len(row)] = row
    figure = new_figure(max(6.0, 0.35 * most + 2.5), 0.6 * len(shares) + 1.8)
    axis = figure.add_subplot()
    heat_map(figure, axis, values, list(shares), numbered(most), unit)
    axis.set_xlabel("expert")
    axis.set_title("Load of the experts", parse_math=False)
    return figure


def load_over_time(path: str | Path) -> "Figure":
    """Draws how each layer's load went through a `fit`: epochs across, experts down.

    Args:
        path: The file that `ExpertMonitor(json=path)` wrote.

    Returns:
        A `matplotlib.figure.Figure` with a panel per layer.

    Raises:
        ValueError: where the file holds no epoch.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    epochs = [json.loads(line)["counts"] for line in lines]
    if not epochs:
        checks.fail("`path` must be a file with at least one epoch.", path=str(path))
    names = list(epochs[0])
    figure = new_figure(max(6.0, 0.25 * len(epochs) + 3.0), 2.4 * len(names) + 0.6)
    panels = figure.subplots(len(names), 1, squeeze=False)[:, 0]
    for axis, name in zip(panels, names, strict=True):
        measure = "load" if "load" in epochs[0][name] else "importance"
        amounts = np.array([np.atleast_2d(epoch[name][measure]).sum(axis=0) for epoch in epochs])
        values = amounts.T / np.maximum(amounts.mean(axis=1), 1e-12)
        rows, columns = numbered(len(values)), [str(number + 1) for number in range(len(epochs))]
        heat_map(figure, axis, values, rows, columns, f"{measure} over the mean")
        axis.set_ylabel("expert")
        axis.set_title(shortened(name), parse_math=False)
    panels[-1].set_xlabel("epoch")
    return figure
