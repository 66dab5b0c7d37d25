"""Pictures: how both models learn, and which patches each expert or slot takes."""

from __future__ import annotations

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Picture

from vision.data import Images
from vision.routing import Use

# Okabe and Ito's colours, told apart by readers with any colour vision.
MODEL_COLOURS = {"dense": "#D55E00", "mixture": "#0072B2"}
EXPERT_COLOURS = (
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
    "#999999",
)
SLOTS_SHOWN = 8
_STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
}


@plt.rc_context(_STYLE)
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


@plt.rc_context(_STYLE)
def draw_use(use: Use, images: Images) -> Picture:
    """Draw a row per test image and a column per slot or expert, and their mean in a last row."""
    columns = distinct(use) if use.is_soft else np.arange(use.weights.shape[-1])
    extra = 1 if use.is_soft else 2  # the image itself, and the first choices in colours
    pixels, labels = images.test[0][use.images], images.test[1][use.images]
    shape = (len(pixels) + 1, len(columns) + extra)
    picture, panels = plt.subplots(*shape, figsize=(1.25 * shape[1] + 1, 1.3 * shape[0] + 0.8))
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    # Of a slot, what counts is more or less than an even share; of an expert, how much.
    even = 1 / use.weights.shape[1] if use.is_soft else 1.0
    strongest = np.percentile(use.weights[..., columns], 99.5) / even
    scale = (
        {"cmap": "RdBu_r", "norm": matplotlib.colors.LogNorm(1 / strongest, strongest)}
        if use.is_soft
        else {"cmap": "Blues", "vmin": 0, "vmax": strongest}
    )
    shown = [*pixels, images.test[0][: use.sample].mean(0)]
    names = [images.recipe.class_names[label] for label in labels]
    names.append(f"mean of\n{use.sample:,} images")
    for row, (image, weights) in enumerate(zip(shown, [*use.weights, use.by_place], strict=True)):
        panels[row, 0].imshow(_displayed(image), cmap="gray")
        panels[row, 0].set_ylabel(names[row], rotation=0, ha="right", va="center")
        if not use.is_soft:
            _colour_first_choices(panels[row, 1], image, weights, use.patch_size)
        for place, column in enumerate(columns, extra):
            panel = panels[row, place]
            heat = _on_pixels(weights[:, column] / even, image.shape, use.patch_size)
            drawn = panel.imshow(heat, **scale)
            _outline(panel, image)
            if row == 0 and use.is_soft:
                panel.set_title(f"slot {column + 1}\npeak {use.contrast[column]:.1f}x")
            elif row == 0:
                colour = EXPERT_COLOURS[column % len(EXPERT_COLOURS)]
                panel.set_title(f"expert {column + 1}", bbox={"fc": colour, "ec": "none"})
    panels[0, 0].set_title("image")
    if not use.is_soft:
        panels[0, 1].set_title("first\nchoice")
    meaning = (
        "a patch's share in the slot's input, over an even share"
        if use.is_soft
        else "weight of the expert in the patch's output (0: not chosen)"
    )
    bar = picture.colorbar(drawn, ax=panels, label=meaning, shrink=0.5, aspect=40, pad=0.01)
    if use.is_soft:  # a logarithmic axis would mark powers of ten, of which there is one
        halves = np.linspace(0, np.log(strongest), 3)[1:]
        bar.set_ticks(np.exp([*-halves[::-1], 0, *halves]), minor=False)
        bar.ax.yaxis.set_major_formatter("{x:.2f}")
        bar.minorticks_off()
    what = "Which patches the slots mix" if use.is_soft else "Which patches go to which expert"
    picture.suptitle(f"{what}: {use.layer} on test images", fontweight="bold")
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


def _colour_first_choices(panel, image: np.ndarray, weights: np.ndarray, patch_size: int) -> None:
    """Colour each patch by the expert it takes most of; black where none had room for it."""
    colours = np.array([matplotlib.colors.to_rgb(colour) for colour in EXPERT_COLOURS])
    best = colours[weights.argmax(-1) % len(colours)] * (weights.max(-1) > 0)[:, None]
    channels = [_on_pixels(best[:, channel], image.shape, patch_size) for channel in range(3)]
    panel.imshow(np.stack(channels, -1))
    _outline(panel, image)
