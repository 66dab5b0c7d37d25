"""Figures with a common look, without pyplot and its global state."""

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from keras_moe.core.optional import import_of_extra
from keras_moe.core.types import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Perceptually even, and told apart by the colour-blind and in grey.
AMOUNT = "cividis"
# Okabe and Ito's colours.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
# The same for fills that letters stand on, and a grey for what has no colour of its own.
FILLS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#999999")
TINT = 0.55  # of a colour in white, light enough for black letters
_MOST_LABELS = 32
_MOST_CHARACTERS = 30  # of a name beside or above a picture


def new_figure(width: float, height: float) -> "Figure":
    """A figure that belongs to no window, and that notebooks show."""
    needed = partial(import_of_extra, "plot", "`keras_moe.plots`")
    needed("matplotlib.figure")
    canvas = needed("matplotlib.backends.backend_agg").FigureCanvasAgg
    from keras_moe.plots._figure import ShownFigure

    figure = ShownFigure(figsize=(width, height), layout="constrained")
    canvas(figure)
    return figure


def heat_map(
    figure: "Figure",
    axis: "Axes",
    values: Array,
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


def _label(axis: "Axis", names: list[str]) -> None:
    step = -(-len(names) // _MOST_LABELS)
    places = list(range(0, len(names), step))
    axis.set_ticks(places, [shortened(names[place]) for place in places], parse_math=False)


def shortened(name: str) -> str:
    """The name, without its middle where a picture has no room for it."""
    if len(name) <= _MOST_CHARACTERS:
        return name
    half = (_MOST_CHARACTERS - 1) // 2
    return f"{name[:half]}…{name[-half:]}"


def numbered(count: int) -> list[str]:
    """Experts' names on an axis."""
    return [str(number) for number in range(count)]


def expert_colours(used: Array) -> tuple[list[str], Array]:
    """Returns the fill of each expert, and whether no other expert shares it, bool `(E,)`.

    Where there are more experts than fills, the most used ones have one, the others are grey.

    Args:
        used: How much each expert is used, `(E,)`.
    """
    num_experts = len(used)
    if num_experts <= len(FILLS):
        return list(FILLS[:num_experts]), np.ones(num_experts, dtype=bool)
    most = np.sort(np.argsort(-used, kind="stable")[: len(FILLS) - 1])
    colours = [FILLS[-1]] * num_experts
    for place, expert in enumerate(most):
        colours[expert] = FILLS[place]
    return colours, np.isin(np.arange(num_experts), most)


def use_of(weights: Array, *, is_soft: bool) -> Array:
    """The share of the tokens that each expert has, `(E,)`.

    In a soft layer every token takes of every expert: it is the mean weight. Elsewhere it is the
    share of the tokens that take most of the expert.

    Args:
        weights: The weight of each expert in each token, `(..., E)`, 0 where a token takes none.
        is_soft: Whether the layer is soft.
    """
    weights = weights.reshape(-1, weights.shape[-1])
    if is_soft:
        return weights.sum(axis=0) / max(len(weights), 1)
    best = weights.argmax(axis=-1)[weights.max(axis=-1) > 0]
    return np.bincount(best, minlength=weights.shape[-1]) / max(len(weights), 1)


def key_shares(used: Array, is_own: Array) -> tuple[list[tuple[int, str]], float, float]:
    """What a legend says: experts with a colour of their own, the other experts, and none.

    Args:
        used: The share of the tokens that each expert has, `(E,)`.
        is_own: Whether an expert has a colour of its own, `(E,)`.
    """
    own = [
        (expert, f"{expert}  {100 * share:.0f} %")
        for expert, share in enumerate(used)
        if is_own[expert] and share > 0
    ]
    return own, float(used[~is_own].sum()), float(1.0 - used.sum())


def tint(colour: str, share: float = TINT) -> tuple[float, ...]:
    """A share of the colour mixed with white."""
    parts = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    return tuple(1.0 - share * (1.0 - part) for part in parts)
