"""Picture of the expert that each patch of an image goes to."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import keras
import numpy as np

from keras_moe.core import checks
from keras_moe.core.types import Array, Data
from keras_moe.inspection.records import check_by_example, expert_weights, is_soft, weights_of
from keras_moe.plots._canvas import FILLS, expert_colours, key_shares, new_figure, shortened, use_of
from keras_moe.plots._images import check_one_per_image, on_grid, on_pixels, pictures_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SIDE = 1.35  # inches of a panel
_MOST_NUMBERS = 12  # patches in a row with room for a number
_DARKEST = 0.6  # of a patch's colour, where the image is black
_NOBODY = "#f4f4f4"


def patch_experts(
    model: keras.layers.Layer,
    images: Data,
    *,
    layer: str | None = None,
    patch_grid: tuple[int, int] | None = None,
    pictures: Array | None = None,
    titles: Sequence[str] | None = None,
    columns: int = 8,
    batch_size: int = 256,
) -> "Figure":
    """Draws images, and below each its patches in the colour of the expert they take most of.

    In a sparse layer that is the chosen expert of most weight. In `SoftMoE` it is the one whose
    slots have most of the patch's combine weights; its colour is as opaque as this weight, and the
    legend has the mean weight of each expert. Where there are more experts than colours, the most
    used ones have a colour, and all have numbers. Images are routed in batches, as `predict` does:
    with a capacity, the other images of a batch matter.

    Args:
        model: A built model with a `MoE`, `SwitchFFN` or `SoftMoE` layer.
        images: Its inputs for a few images, `(n, height, width, channels)`, or what else it takes.
        layer: Name of the layer; None where there is one only. Defaults to `None`.
        patch_grid: Rows and columns of patches. Tokens before them, such as one for the class, are
            left out. None for the grid of the image's shape. Defaults to `None`.
        pictures: `(n, height, width)` or `(n, height, width, channels)`, what to show where inputs
            are not images of 1 or 3 channels. Defaults to `None`.
        titles: Optional strings, one per image. Defaults to `None`.
        columns: Positive integer, images side by side. Defaults to `8`.
        batch_size: Positive integer, examples per call of the model. Defaults to `256`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: on an unknown layer, one whose inputs have other things than the examples on
            their first axis, pictures that are none, or tokens that fill no grid.
    """
    checks.positive_int("columns", columns)
    shown = pictures_of(images, pictures)
    name, record = expert_weights(model, images, layer, batch_size)
    check_by_example(name, record, images)
    weights = weights_of(record)
    check_one_per_image(len(weights), shown, titles)
    weights = on_grid(weights, patch_grid, shown.shape[1:3])
    return draw_patches(name, weights, shown, titles, columns, is_soft=is_soft(record))


def draw_patches(
    name: str,
    weights: Array,
    shown: Array,
    titles: Sequence[str] | None,
    columns: int,
    *,
    is_soft: bool,
) -> "Figure":
    """Draws pictures `(n, height, width, 3)`, and weights `(n, rows, columns, E)` below them."""
    across = min(columns, len(shown))
    down = math.ceil(len(shown) / across)
    figure = new_figure(max(across * _SIDE, 5.0), down * (2 * _SIDE + 0.3) + 0.8)
    panels = figure.subplots(2 * down, across, squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    used = use_of(weights, is_soft=is_soft)
    colours, is_own = expert_colours(used)
    for number, picture in enumerate(shown):
        row, column = divmod(number, across)
        above, below = panels[2 * row, column], panels[2 * row + 1, column]
        above.imshow(picture)
        _draw_choices(below, picture, weights[number], colours, is_soft=is_soft)
        if titles is not None:
            above.set_title(str(titles[number]), fontsize=9, parse_math=False)
    _draw_keys(figure, used, colours, is_own)
    how = ", as opaque as its weight" if is_soft else ""
    title = f"Which expert each patch takes{' most of' if is_soft else ''}: {shortened(name)}{how}"
    figure.suptitle(title, fontsize=12, parse_math=False)
    return figure


def _draw_choices(
    panel: "Axes", picture: Array, weights: Array, colours: list[str], *, is_soft: bool
) -> None:
    """Patches in their experts' colours, as bright as the picture; a cross where none had room."""
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import Normal, Stroke

    rows, columns, _ = weights.shape
    height, width, _ = picture.shape
    best, taken = weights.argmax(axis=-1), weights.max(axis=-1) > 0
    patches = np.array([to_rgb(colour) for colour in colours])[best]
    if is_soft:
        patches = 1.0 - weights.max(axis=-1, keepdims=True) * (1.0 - patches)
    patches[~taken] = to_rgb(_NOBODY)
    brightness = _DARKEST + (1.0 - _DARKEST) * picture.mean(axis=-1, keepdims=True)
    extent = (0.0, float(columns), float(rows), 0.0)
    aspect = (height / rows) / (width / columns)
    patches = on_pixels(patches, height, width)
    panel.imshow(patches * brightness, extent=extent, aspect=aspect)
    if max(rows, columns) > _MOST_NUMBERS:
        return
    style = {"ha": "center", "va": "center_baseline", "fontsize": min(9.0, 64 / max(rows, columns))}
    outline = [Stroke(linewidth=1.5, foreground="0.15"), Normal()]
    for (row, column), expert in np.ndenumerate(best):
        text = str(expert) if taken[row, column] else "✗"
        place = column + 0.5, row + 0.5
        panel.text(*place, text, color="white", path_effects=outline, **style)


def _draw_keys(figure: "Figure", used: Array, colours: list[str], is_own: Array) -> None:
    from matplotlib.patches import Patch

    own, others, none = key_shares(used, is_own)
    keys = [Patch(color=colours[expert], label=label) for expert, label in own]
    if others:
        keys.append(Patch(color=FILLS[-1], label=f"others  {100 * others:.0f} %"))
    if none > 1e-6:
        keys.append(Patch(color=_NOBODY, label=f"✗ none  {100 * none:.0f} %"))
    ncols = int(figure.get_figwidth())
    figure.legend(handles=keys, loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)
