"""Pictures: how the models learn, and which expert each byte of a passage takes."""

from __future__ import annotations

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common.style import COLOURS, STYLE
from matplotlib.figure import Figure as Picture


@plt.rc_context(STYLE)
def draw_learning_curves(contestants: list, runs: dict, options) -> Picture:
    """Draw the held-out bits per byte by step, and how much less they are than the dense ones.

    Thick lines are means over seeds, thin ones the seeds.
    """
    picture, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    curves = {
        contestant.name: np.array(
            [run.history["val_bits_per_byte"] for run in runs[contestant.name]]
        )
        for contestant in contestants
    }
    steps = options.steps_per_epoch * np.arange(1, options.epochs + 1)
    dense = curves[contestants[0].name]
    for contestant, colour in zip(contestants, COLOURS, strict=False):
        curve = curves[contestant.name]
        for panel, values in zip(panels, (curve, curve - dense), strict=True):
            panel.plot(steps, values.T, color=colour, lw=0.8, alpha=0.5)
            panel.plot(steps, values.mean(0), color=colour, lw=2.2, label=contestant.title)
    panels[0].set(title="bits per byte, held-out text", yscale="log")
    panels[0].yaxis.set_major_formatter("{x:.1f}")
    panels[0].yaxis.set_minor_formatter("{x:.1f}")
    panels[1].set_title("the same, less the dense model's of the same seed")
    for panel in panels:
        panel.set_xlabel("training step")
        panel.grid(alpha=0.25, which="both")
    handles, labels = panels[0].get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return picture
