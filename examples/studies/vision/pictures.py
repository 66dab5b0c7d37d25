"""Pictures: how both models learn, and which patches each expert or slot takes."""

from __future__ import annotations

import keras
import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common.style import STYLE
from matplotlib.figure import Figure as Picture

from keras_moe.plots import patch_experts
from vision.data import Images
from vision.routing import Use

# Okabe and Ito's colours, told apart by readers with any colour vision.
MODEL_COLOURS = {"dense": "#D55E00", "mixture": "#0072B2"}
SLOTS_SHOWN = 8


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
    if use.is_soft:
        return draw_slots(use, images)
    pixels, labels = images.test[0][use.images], images.test[1][use.images]
    titles = [images.recipe.class_names[label] for label in labels]
    return patch_experts(classifier, pixels.astype("float32"), layer=use.layer, titles=titles)


@plt.rc_context(STYLE)
def draw_slots(use: Use, images: Images) -> Picture:
    """Draw a row per test image and a column per slot, and their mean in a last row."""
    columns = distinct(use)
    pixels, labels = images.test[0][use.images], images.test[1][use.images]
    shape = (len(pixels) + 1, len(columns) + 1)
    picture, panels = plt.subplots(*shape, figsize=(1.25 * shape[1] + 1, 1.3 * shape[0] + 0.8))
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    even = 1 / use.weights.shape[1]  # what counts is more or less than an even share
    strongest = np.percentile(use.weights[..., columns], 99.5) / even
    scale = {"cmap": "RdBu_r", "norm": matplotlib.colors.LogNorm(1 / strongest, strongest)}
    shown = [*pixels, images.test[0][: use.sample].mean(0)]
    names = [images.recipe.class_names[label] for label in labels]
    names.append(f"mean of\n{use.sample:,} images")
    for row, (image, weights) in enumerate(zip(shown, [*use.weights, use.by_place], strict=True)):
        panels[row, 0].imshow(_displayed(image), cmap="gray")
        panels[row, 0].set_ylabel(names[row], rotation=0, ha="right", va="center")
        for place, column in enumerate(columns, 1):
            panel = panels[row, place]
            heat = _on_pixels(weights[:, column] / even, image.shape, use.patch_size)
            drawn = panel.imshow(heat, **scale)
            _outline(panel, image)
            if row == 0:
                panel.set_title(f"slot {column + 1}\npeak {use.contrast[column]:.1f}x")
    panels[0, 0].set_title("image")
    meaning = "a patch's share in the slot's input, over an even share"
    bar = picture.colorbar(drawn, ax=panels, label=meaning, shrink=0.5, aspect=40, pad=0.01)
    # A logarithmic axis would mark powers of ten, of which there is one.
    halves = np.linspace(0, np.log(strongest), 3)[1:]
    bar.set_ticks(np.exp([*-halves[::-1], 0, *halves]), minor=False)
    bar.ax.yaxis.set_major_formatter("{x:.2f}")
    bar.minorticks_off()
    title = f"Which patches the slots mix: {use.layer} on test images"
    picture.suptitle(title, fontweight="bold")
    return picture


def distinct(use: Use) -> np.ndarray:
    """Return slots that differ: first the most selective one, then each farthest from those."""
    maps = use.weights.transpose(2, 0, 1).reshape(use.weights.shape[2], -1)
    chosen = [int(use.contrast.argmax())]
    while len(chosen) < min(SLOTS_SHOWN, len(maps)):
        apart = ((maps[:, None] - maps[chosen]) ** 2).sum(-1).min(1)
        chosen.append(int(apart.argmax()))
    return np.array(chosen)


def _displayed(image: np.ndarray) -> np.ndarray:
    return (image[..., 0] if image.shape[-1] == 1 else image) / 255


def _on_pixels(of_patches: np.ndarray, shape: tuple[int, ...], patch_size: int) -> np.ndarray:
    """Repeat a value per patch over the patch's pixels."""
    grid = of_patches.reshape(shape[0] // patch_size, shape[1] // patch_size)
    return grid.repeat(patch_size, 0).repeat(patch_size, 1)


def _outline(panel, image: np.ndarray) -> None:
    """Draw where the image is half as bright as it gets."""
    grey = image.astype(float).mean(-1)
    panel.contour(grey, levels=[(grey.min() + grey.max()) / 2], colors="0.15", linewidths=0.8)
