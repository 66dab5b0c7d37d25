"""The chart: time over a dense layer's, against the number of experts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from benchmarks.latest import Latest, Machine
from benchmarks.rows import PASSES, ROWS

# Okabe and Ito's colours and a dark red, which the colour-blind tell apart; markers do in grey.
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
    "#000000",
    "#999999",
    "#882255",
)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "h")
TITLES = {"forward": "inference", "gradient": "training"}
_NARROWEST = 8.0  # inches, that title and legend need
_CURVE = [row for row in ROWS if row.group == "curve"]
_NAMES = {
    "jax": "JAX",
    "tensorflow": "TensorFlow graph",
    "tensorflow-xla": "TensorFlow XLA",
    "torch": "PyTorch",
    "torch-compile": "PyTorch compiled",
}

Points = dict[str, list[tuple[int, float]]]


def points_of(rows: Mapping[str, dict[str, Any]], which: str) -> Points:
    """By subject, the ratio at each number of experts."""
    points: Points = {}
    for row in _CURVE:
        for line in rows.get(row.name, {}).get("lines", []):
            if line["pass"] == which:
                point = (row.sizes.experts, line["ratio"]["median"])
                points.setdefault(line["subject"], []).append(point)
    return points


def draw(machines: Mapping[Machine, Latest], path: Path) -> bool:
    """Draws the machine with the most curves: a column per backend, a line per dispatcher and peer.

    Returns:
        Whether there was anything to draw.
    """
    panels = {
        machine: [
            backend for backend in latest.backends if points_of(latest.rows[backend], PASSES[0])
        ]
        for machine, latest in machines.items()
    }
    machine = max(panels, key=lambda machine: len(panels[machine]), default=None)
    if machine is None or not panels[machine]:
        return False
    backends, latest = panels[machine], machines[machine]
    curves = {
        (which, backend): points_of(latest.rows[backend], which)
        for which in PASSES
        for backend in backends
    }
    subjects = list(dict.fromkeys(name for points in curves.values() for name in points))
    figure, axes = plt.subplots(
        len(PASSES),
        len(backends),
        figsize=(max(3.0 * len(backends) + 1.0, _NARROWEST), 7.0),
        sharex=True,
        sharey="row",
        squeeze=False,
        layout="constrained",
    )
    for (which, backend), points in curves.items():
        axis = axes[PASSES.index(which)][backends.index(backend)]
        _draw_panel(axis, points, subjects)
        axis.set_title(f"{_NAMES[backend]}, {TITLES[which]}", fontsize=11)
    _label(figure, axes, machine, subjects)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Without the name of the program, the same data give the same bytes.
    figure.savefig(path, dpi=130, metadata={"Software": None})
    plt.close(figure)
    return True


def _draw_panel(axis: Axes, points: Points, subjects: list[str]) -> None:
    for index, subject in enumerate(subjects):
        if subject in points:
            experts, ratios = zip(*sorted(points[subject]), strict=True)
            axis.plot(
                experts,
                ratios,
                color=COLOURS[index % len(COLOURS)],
                marker=MARKERS[index % len(MARKERS)],
                linestyle="-" if index < len(COLOURS) else "--",
                linewidth=2,
                markersize=6,
                label=subject,
            )
    axis.axhline(1.0, color="black", linewidth=1, linestyle=":")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log", base=2)
    experts = [row.sizes.experts for row in _CURVE]
    axis.set_xlim(experts[0] / 1.3, experts[-1] * 1.3)
    axis.xaxis.set_major_locator(FixedLocator(experts))
    plain = FuncFormatter(lambda value, _: f"{value:g}")
    axis.xaxis.set_major_formatter(plain)
    axis.yaxis.set_major_formatter(plain)
    axis.xaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_minor_locator(NullLocator())
    axis.grid(alpha=0.3)


def _label(figure: Figure, axes: np.ndarray, machine: Machine, subjects: list[str]) -> None:
    for axis in axes[-1]:
        axis.set_xlabel("number of experts E")
    for line in axes:
        line[0].set_ylabel("time / dense layer's")
    tokens, width, hidden, _, top_k = _CURVE[0].sizes
    figure.suptitle(
        "Time of a mixture / time of a dense layer of the same active FLOPs\n"
        f"T={tokens}, d={width}, h={hidden}, k={top_k}; {machine.device}, {machine.cores} cores, "
        f"{machine.dtype}",
        fontsize=11,
    )
    by_label = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        by_label |= dict(zip(labels, handles, strict=True))
    figure.legend(
        [by_label[name] for name in subjects],
        subjects,
        loc="outside lower center",
        ncols=3,
        fontsize=9,
    )
