"""Pictures: how both models learn, and which patches each expert or slot takes."""

from __future__ import annotations

import keras
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common.style import STYLE
from matplotlib.figure import Figure as Picture

from keras_moe.plots import patch_experts, slot_patches
from vision.data import Images
from vision.routing import Use

# Okabe and Ito's colours, told apart by readers with any colour vision.
MODEL_COLOURS = {"dense": "#D55E00", "mixture": "#0072B2"}


@plt.rc_context(STYLE)
def draw_learning_curves(contestants: list, runs: dict, options) -> Picture:
    """Draw loss and accuracy by step: training dashed, validation solid, a line per seed."""
    picture, panels = plt.subplots(1, 2, figsize=(11, 4))
    for panel, figure in zip(panels, ("loss", "accuracy"), strict=True):
        for contestant in contestants:
            colour = MODEL_COLOURS[contestant.name]
            for number, run in enumerate(runs[contestant.name]):
                trained, validated = run.history[figure], run.history[f"val_{figure}"]
                steps = options.steps_per_epoch * np.arange(1, len(trained) + 1)
                label = contestant.title if number == 0 else None
                panel.plot(steps, trained, "--", color=colour, lw=0.9, alpha=0.6)
                panel.plot(steps, validated, color=colour, lw=1.6, alpha=0.9, label=label)
        panel.set_xlabel("training step")
        panel.set_title(figure)
        panel.grid(alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    for line, meaning in (("-", "validation"), ("--", "training, dropout and augmentation on")):
        handles.append(plt.Line2D([], [], color="0.35", ls=line))
        labels.append(meaning)
    picture.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return picture


def draw_use(use: Use, classifier: keras.Model, images: Images) -> Picture:
    """Draw what the mixture does with a few test images."""
    pixels, labels = images.test[0][: use.sample].astype("float32"), images.test[1][: use.sample]
    titles = [images.recipe.class_names[label] for label in labels]
    if use.is_soft:
        return slot_patches(classifier, pixels, layer=use.layer, show=use.images, titles=titles)
    titles = [titles[place] for place in use.images]
    return patch_experts(classifier, pixels[use.images], layer=use.layer, titles=titles)
