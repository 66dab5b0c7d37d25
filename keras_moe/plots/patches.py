"""Picture of the expert that each patch of an image goes to."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import keras
import numpy as np

from keras_moe.core import checks
from keras_moe.core.types import Array, Data
from keras_moe.inspection.records import check_by_example, expert_weights, weights_of
from keras_moe.plots._canvas import FILLS, expert_colours, new_figure

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

    In a sparse layer that is the chosen expert of most weight, in `SoftMoE` the one whose slots
    have most of the patch's combine weights. Where there are more experts than colours, the most
    used ones have a colour, and all have numbers.

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
    if pictures is None and not hasattr(images, "shape"):
        checks.fail(
            "`pictures` must be given where the model's inputs are not one array of images.",
            pictures=None,
        )
    shown = _as_pictures(images if pictures is None else pictures)
    name, record = expert_weights(model, images, layer, batch_size)
    check_by_example(name, record, images)
    weights = weights_of(record)
    if len(shown) != len(weights) or (titles is not None and len(titles) != len(shown)):
        checks.fail(
            f"`pictures` and `titles` must have one entry for each of {len(weights)} images.",
            pictures=len(shown),
            titles=None if titles is None else len(titles),
        )
    weights = _on_grid(weights, patch_grid, shown.shape[1:3])
    across = min(columns, len(shown))
    down = math.ceil(len(shown) / across)
    figure = new_figure(max(across * _SIDE, 5.0), down * (2 * _SIDE + 0.3) + 0.8)
    panels = figure.subplots(2 * down, across, squeeze=False)
    for panel in panels.flat:
        panel.axis("off")
    used = _used(weights)
    for number, picture in enumerate(shown):
        row, column = divmod(number, across)
        above, below = panels[2 * row, column], panels[2 * row + 1, column]
        above.imshow(picture)
        _draw_choices(below, picture, weights[number], expert_colours(used)[0])
        if titles is not None:
            above.set_title(str(titles[number]), fontsize=9, parse_math=False)
    _draw_keys(figure, used, weights)
    title = f"Which expert each patch takes: {name}"
    figure.suptitle(title, fontsize=12, parse_math=False)
    return figure


def fits_grid(weights: Array, grid: tuple[int, int] | None, images: Data) -> bool:
    """Whether weights `(n, ..., E)` are those of the patches of images that can be shown."""
    shape = tuple(getattr(images, "shape", ()))
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[-1] not in (1, 3)):
        return False
    if weights.ndim < 3 or len(weights) != shape[0]:
        return False
    if grid is None and weights.ndim == 4:
        return True
    tokens = int(np.prod(weights.shape[1:-1]))
    rows, columns = grid or _grid_like(tokens, (shape[1], shape[2]))
    return 0 < rows * columns <= tokens


def _as_pictures(images: Data) -> Array:
    """Colour pictures `(n, height, width, 3)` between 0 and 1."""
    images = np.asarray(images, dtype=np.float64)
    if images.ndim == 3:
        images = images[..., None]
    if images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
        checks.fail(
            "`pictures` must be images of 1 or 3 channels, (n, height, width, channels), where the "
            "model's inputs are none.",
            shape=images.shape,
        )
    low, high = images.min(), images.max()
    images = (images - low) / max(high - low, 1e-12)
    return np.broadcast_to(images, (*images.shape[:3], 3))


def _on_grid(weights: Array, grid: tuple[int, int] | None, size: tuple[int, int]) -> Array:
    """The weights of the patches, `(n, rows, columns, E)`."""
    if grid is None and weights.ndim == 4:  # the layer's inputs were a grid
        return weights
    weights = weights.reshape(len(weights), -1, weights.shape[-1])
    tokens = weights.shape[1]
    rows, columns = grid or _grid_like(tokens, size)
    if not 0 < rows * columns <= tokens:
        checks.fail(
            f"`patch_grid` must be rows and columns of at most the {tokens} tokens.",
            patch_grid=grid,
        )
    return weights[:, tokens - rows * columns :].reshape(len(weights), rows, columns, -1)


def _grid_like(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns in the proportion of the image, (0, 0) where tokens do not fill them."""
    rows = round(math.sqrt(tokens * size[0] / size[1]))
    columns = tokens // max(rows, 1)
    is_full = rows * columns == tokens and rows * size[1] == columns * size[0]
    return (rows, columns) if is_full else (0, 0)


def _used(weights: Array) -> Array:
    """The number of patches that take most of an expert, `(E,)`."""
    best = weights.argmax(axis=-1)[weights.max(axis=-1) > 0]
    return np.bincount(best, minlength=weights.shape[-1])


def _draw_choices(panel: "Axes", picture: Array, weights: Array, colours: list[str]) -> None:
    """Patches in their experts' colours, as bright as the picture; a cross where none had room."""
    from matplotlib.colors import to_rgb
    from matplotlib.patheffects import Normal, Stroke

    rows, columns, _ = weights.shape
    height, width, _ = picture.shape
    best, taken = weights.argmax(axis=-1), weights.max(axis=-1) > 0
    patches = np.array([to_rgb(colour) for colour in colours])[best]
    patches[~taken] = to_rgb(_NOBODY)
    down, across = np.arange(height) * rows // height, np.arange(width) * columns // width
    brightness = _DARKEST + (1.0 - _DARKEST) * picture.mean(axis=-1, keepdims=True)
    extent = (0.0, float(columns), float(rows), 0.0)
    aspect = (height / rows) / (width / columns)
    panel.imshow(patches[down][:, across] * brightness, extent=extent, aspect=aspect)
    if max(rows, columns) > _MOST_NUMBERS:
        return
    style = {"ha": "center", "va": "center_baseline", "fontsize": min(9.0, 64 / max(rows, columns))}
    outline = [Stroke(linewidth=1.5, foreground="0.15"), Normal()]
    for (row, column), expert in np.ndenumerate(best):
        text = str(expert) if taken[row, column] else "✗"
        place = column + 0.5, row + 0.5
        panel.text(*place, text, color="white", path_effects=outline, **style)


def _draw_keys(figure: "Figure", used: Array, weights: Array) -> None:
    from matplotlib.patches import Patch

    colours, is_own = expert_colours(used)
    count = weights[..., 0].size
    keys = [
        Patch(color=colours[expert], label=f"{expert}  {100 * used[expert] / count:.0f} %")
        for expert in range(len(used))
        if is_own[expert] and used[expert]
    ]
    if used[~is_own].sum():
        share = 100 * used[~is_own].sum() / count
        keys.append(Patch(color=FILLS[-1], label=f"others  {share:.0f} %"))
    if used.sum() < count:
        share = 100 * (1 - used.sum() / count)
        keys.append(Patch(color=_NOBODY, label=f"✗ none  {share:.0f} %"))
    ncols = int(figure.get_figwidth())
    figure.legend(handles=keys, loc="outside lower center", ncols=ncols, frameon=False, fontsize=9)
