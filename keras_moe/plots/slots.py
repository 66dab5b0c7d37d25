"""Picture of the patches that each slot of a soft layer is made of."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import keras
import numpy as np

from keras_moe.core import checks
from keras_moe.core.types import Array, Data
from keras_moe.inspection.mixtures import one_layer
from keras_moe.inspection.records import SLOTS, Record, check_by_example, records_of
from keras_moe.plots._canvas import new_figure, shortened
from keras_moe.plots._images import check_one_per_image, on_grid, on_pixels, pictures_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage

_SIDE = 1.25  # inches of a panel
_IMAGES = 6  # that are drawn where the caller names none
# The colours reach to at least twice an even share, so that slots which average look as if.
_LEAST_SCALE = 2.0
_LARGEST = 99.5  # percentile of the shares that the colours reach to


def slot_patches(
    model: keras.layers.Layer,
    images: Data,
    *,
    layer: str | None = None,
    slots: int = 8,
    show: Sequence[int] | None = None,
    patch_grid: tuple[int, int] | None = None,
    pictures: Array | None = None,
    titles: Sequence[str] | None = None,
    batch_size: int = 256,
) -> "Figure":
    """Draws what each slot of a `SoftMoE` is made of: a row per image, and a column per slot.

    A colour is the share of a patch in the slot's input, over an even share: red for more than that
    and blue for less. The last row is the mean over all images. Slots are shown that differ: first
    the most selective one, then each that is farthest from those before. Its peak is the largest
    share of a patch over an even one, the mean over all images: 1 for a slot that averages.

    Args:
        model: A built model with a `SoftMoE` layer that is not causal.
        images: Its inputs for some images, `(n, height, width, channels)`, or what else it takes.
        layer: Name of the layer; None where there is one only. Defaults to `None`.
        slots: Positive integer, how many slots are shown. Defaults to `8`.
        show: Places of the images that are drawn; None for the first six. Defaults to `None`.
        patch_grid: Rows and columns of patches. Tokens before them, such as one for the class, are
            left out. None for the grid of the image's shape. Defaults to `None`.
        pictures: `(n, height, width)` or `(n, height, width, channels)`, what to show where inputs
            are not images of 1 or 3 channels. Defaults to `None`.
        titles: Optional strings, one per image. Defaults to `None`.
        batch_size: Positive integer, examples per call of the model. Defaults to `256`.

    Returns:
        A `matplotlib.figure.Figure`. Slots are named as in `slot_similarity`, "expert.slot".

    Raises:
        ValueError: on an unknown layer, one whose inputs have other things than the examples on
            their first axis, pictures that are none, images to show that are not there, or tokens
            that fill no grid.
    """
    checks.positive_int("slots", slots)
    shown = pictures_of(images, pictures)
    # In a causal layer each token has slots of its own.
    records = {
        name: record
        for name, record in records_of(model, images, batch_size, SLOTS).items()
        if record.fields["dispatch"].ndim == 4
    }
    name, record = one_layer(model, records, layer, "a `SoftMoE` that is not causal")
    check_by_example(name, record, images)
    check_one_per_image(len(record.fields["dispatch"]), shown, titles)
    places = list(range(len(shown)))[:_IMAGES] if show is None else list(show)
    if not places or not set(places) <= set(range(len(shown))):
        checks.fail(f"`show` must have places of the {len(shown)} images.", show=places)
    named = None if titles is None else [titles[place] for place in places]
    return draw_slot_patches(name, record, shown, places, slots, patch_grid, named)


def draw_slot_patches(
    name: str,
    record: Record,
    shown: Array,
    places: Sequence[int],
    slots: int = 8,
    patch_grid: tuple[int, int] | None = None,
    titles: Sequence[str] | None = None,
) -> "Figure":
    """Draws the images at some places, with titles of theirs, and what slots take of all images."""
    from matplotlib.colors import LogNorm

    dispatch = record.fields["dispatch"]
    count, tokens, _, per_expert = dispatch.shape
    over_even = dispatch.reshape(count, tokens, -1) * float(tokens)
    peaks = over_even.max(axis=1).mean(axis=0)
    chosen = _distinct(over_even[list(places)], peaks, slots)
    over_even = on_grid(over_even[..., chosen], patch_grid, shown.shape[1:3])
    strongest = max(float(np.percentile(over_even[list(places)], _LARGEST)), _LEAST_SCALE)
    rows, columns = len(places) + 1, len(chosen) + 1
    figure = new_figure(_SIDE * columns + 2.0, _SIDE * rows + 1.0)
    panels = figure.subplots(rows, columns, squeeze=False)
    for panel in panels.flat:
        panel.set(xticks=[], yticks=[])
        panel.spines[:].set_visible(False)
    pictures = [*shown[list(places)], shown.mean(axis=0)]
    maps = [*over_even[list(places)], over_even.mean(axis=0)]
    for row, (picture, heat) in enumerate(zip(pictures, maps, strict=True)):
        panels[row, 0].imshow(picture)
        for panel, of_slot in zip(panels[row, 1:], np.moveaxis(heat, -1, 0), strict=True):
            # Padding has no logarithm.
            pixels = np.maximum(on_pixels(of_slot, *picture.shape[:2]), 1 / strongest)
            drawn = panel.imshow(pixels, cmap="RdBu_r", norm=LogNorm(1 / strongest, strongest))
            _outline(panel, picture)
    names = [""] * len(places) if titles is None else [shortened(str(title)) for title in titles]
    for panel, text in zip(panels[:, 0], [*names, f"mean of\n{count:,} images"], strict=True):
        panel.set_ylabel(text, rotation=0, ha="right", va="center", parse_math=False)
    for panel, slot in zip(panels[0, 1:], chosen, strict=True):
        called = f"slot {slot // per_expert}.{slot % per_expert}"
        panel.set_title(f"{called}\npeak {peaks[slot]:.1f}x", fontsize=9)
    _add_scale(figure, panels, drawn, strongest)
    figure.suptitle(f"What each slot is made of: {shortened(name)}", fontsize=12, parse_math=False)
    return figure


def _add_scale(figure: "Figure", panels: Array, drawn: "AxesImage", strongest: float) -> None:
    label = "share of a patch over an even one"
    bar = figure.colorbar(drawn, ax=panels, shrink=0.6, aspect=40, pad=0.01, label=label)
    # A logarithmic axis would mark powers of ten, of which there is one.
    halves = np.linspace(0.0, np.log(strongest), 3)[1:]
    bar.set_ticks(np.exp([*-halves[::-1], 0.0, *halves]).tolist(), minor=False)
    bar.ax.yaxis.set_major_formatter("{x:.2f}")
    bar.minorticks_off()


def _distinct(maps: Array, peaks: Array, most: int) -> list[int]:
    """Slots that differ: first the most selective one, then each farthest from those before."""
    flat = np.moveaxis(maps, -1, 0).reshape(maps.shape[-1], -1)
    chosen = [int(peaks.argmax())]
    apart = np.square(flat - flat[chosen[0]]).sum(axis=1)
    while len(chosen) < min(most, len(flat)):
        apart[chosen] = -1.0
        chosen.append(int(apart.argmax()))
        apart = np.minimum(apart, np.square(flat - flat[chosen[-1]]).sum(axis=1))
    return chosen


def _outline(panel: "Axes", picture: Array) -> None:
    """Draws where the image is half as bright as it gets."""
    grey = picture.mean(axis=-1)
    if min(grey.shape) > 1 and grey.max() > grey.min():
        panel.contour(grey, levels=[(grey.min() + grey.max()) / 2], colors="0.15", linewidths=0.8)
