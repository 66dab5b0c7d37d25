"""Picture of the expert that each token of a text goes to."""

import unicodedata
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import keras
import numpy as np

from keras_moe.core import checks
from keras_moe.core.types import Array, Data
from keras_moe.inspection.records import expert_weights, is_soft, weights_of
from keras_moe.plots._canvas import (
    FILLS,
    TINT,
    expert_colours,
    key_shares,
    new_figure,
    shortened,
    tint,
    use_of,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In points, 1/72 inch, as fonts are.
_FONT = 11.0
_CHARACTER = 0.602 * _FONT  # the advance of DejaVu Sans Mono
_SMALL = 7.0
_DIGIT = 0.64 * _SMALL
_BOX, _BAR, _NUMBER, _GAP = 17.0, 4.0, 9.0, 7.0
_MARGIN, _TITLE = 12.0, 26.0
_KEY_WIDTH, _KEY_HEIGHT, _KEYS_TITLE = 82.0, 17.0, 24.0
_SHOWN = {"\n": "↵", " ": "·", "\t": "→", "\r": "␍"}  # as in an editor
_NONE = "#e8e8e8"


class _Token(NamedTuple):
    """A token's place: points from the left, the line it is on, its width in points."""

    text: str
    left: float
    line: int
    width: float


def token_experts(
    model: keras.layers.Layer,
    tokens: Data,
    texts: Sequence[str],
    *,
    layer: str | None = None,
    choices: int = 2,
    line_width: int = 80,
    most: int | None = None,
) -> "Figure":
    """Draws a text whose tokens have the colour of the expert that they take most of.

    Under a token stand a bar, whose parts are the weights of its experts, and their numbers, best
    first. A text of more experts than there are colours gives them to the most used ones. In
    `SoftMoE` a colour is as strong as the expert's weight, and the legend has mean weights. A
    window is routed alone; in a batch a layer with a capacity may drop other tokens of it, which
    `keras_moe.report` shows.

    Args:
        model: A built model with a `MoE`, `SwitchFFN` or `SoftMoE` layer.
        tokens: Its inputs for one sequence, `(1, T)` or `(1, T, d)`, or a dict or list of such; of
            several windows of a text, `(B, T)`, each is routed on its own and all are shown.
        texts: B T strings, the pieces of text that the tokens stand for. Spaces and line ends are
            shown as an editor does.
        layer: Name of the layer; None where there is one only. Defaults to `None`.
        choices: Positive integer, how many experts of a token are shown; no more than it takes.
            Defaults to `2`.
        line_width: Positive integer, the characters of a line. Defaults to `80`.
        most: Optional positive integer, how many tokens are shown, from the first. Defaults to
            `None`.

    Returns:
        A `matplotlib.figure.Figure`.

    Raises:
        ValueError: on an unknown layer, or where there is not a text for each token.
    """
    checks.positive_int("choices", choices)
    checks.positive_int("line_width", line_width)
    name, record = expert_weights(model, tokens, layer, batch_size=1)
    weights = weights_of(record)
    weights = weights.reshape(-1, weights.shape[-1])
    if len(texts) != len(weights):
        checks.fail(
            f"`texts` must have one string for each of the {len(weights)} tokens that {name!r} "
            "decides about.",
            **{"len(texts)": len(texts)},
        )
    if most is not None:
        texts, weights = texts[:most], weights[: checks.positive_int("most", most)]
    return draw_tokens(name, weights, texts, choices, line_width, is_soft=is_soft(record))


def draw_tokens(
    name: str,
    weights: Array,
    texts: Sequence[str],
    choices: int = 2,
    line_width: int = 80,
    *,
    is_soft: bool,
) -> "Figure":
    """Draws pieces of text and their weights `(T, E)`."""
    order = np.argsort(-weights, axis=-1, kind="stable")[:, :choices]
    order = order[:, : max(int((weights > 0).sum(axis=-1).max()), 1)]
    digits = len(str(weights.shape[-1] - 1))
    placed = _placed(texts, line_width * _CHARACTER, digits * _DIGIT + 2.0)
    of = " most of" if is_soft else ""
    title = f"Which expert each token takes{of}: {shortened(name)}"
    return _drawn(placed, weights, order, title, is_soft=is_soft)


def _placed(texts: Sequence[str], width: float, least: float) -> list[_Token]:
    """Breaks lines where they are full, and behind a line end."""
    placed, left, line = [], 0.0, 0
    for text in texts:
        shown = "".join(_SHOWN.get(character, character) for character in text) or "∅"
        wide = sum(unicodedata.east_asian_width(character) in "WF" for character in shown)
        size = max((len(shown) + wide) * _CHARACTER + 3.0, least)
        if left and left + size > width and text != "\n":  # which may stand in the margin
            left, line = 0.0, line + 1
        placed.append(_Token(shown, left, line, size))
        left += size + 2.0
        if "\n" in text:
            left, line = 0.0, line + 1
    return placed


def _drawn(
    placed: list[_Token], weights: Array, order: Array, title: str, *, is_soft: bool
) -> "Figure":
    colours, keys = _colours(weights, is_soft=is_soft)
    line_height = _BOX + _BAR + order.shape[1] * _NUMBER + _GAP
    width = max([token.left + token.width for token in placed] + [420.0])
    columns = int(width // _KEY_WIDTH)
    legend = _KEYS_TITLE - (-len(keys) // columns) * _KEY_HEIGHT
    bottom = _TITLE + (max((token.line for token in placed), default=0) + 1) * line_height
    size = width + 2 * _MARGIN, bottom + legend + 2 * _MARGIN
    figure = new_figure(size[0] / 72, size[1] / 72)
    figure.set_layout_engine("none")  # points are points: the letters must fit their boxes
    axis = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axis.set(xlim=(-_MARGIN, width + _MARGIN), ylim=(size[1] - _MARGIN, -_MARGIN))
    axis.axis("off")
    axis.text(0, 4, title, fontsize=12, va="center", parse_math=False)
    most = max(float(weights.sum(axis=-1).max(initial=0.0)), 1.0)
    for token, row, best in zip(placed, weights, order, strict=True):
        strength = float(row.max(initial=0.0)) if is_soft else 1.0
        fills = [tint(colour, TINT * strength) for colour in colours]
        top = _TITLE + token.line * line_height
        _draw_token(axis, token, top, row / most, best, colours, fills)
    heading = (
        f"Colour: the expert of most weight{', as strong as that' if is_soft else ''}. "
        "Bar: the weights. Numbers: the experts, best first."
    )
    axis.text(0, bottom + 8.0, heading, fontsize=8, va="center", color="0.35")
    for number, (label, style) in enumerate(keys):
        row, column = divmod(number, columns)
        left, top = column * _KEY_WIDTH, bottom + _KEYS_TITLE + row * _KEY_HEIGHT
        _box(axis, left, top, 16.0, 10.0, **style)
        axis.text(left + 21.0, top + 5.5, label, fontsize=9, va="center")
    return figure


def _colours(
    weights: Array, *, is_soft: bool
) -> tuple[list[str], list[tuple[str, dict[str, Any]]]]:
    """Each expert's colour, and the labels and styles of the legend."""
    used = use_of(weights, is_soft=is_soft)
    colours, is_own = expert_colours(used)
    own, others, none = key_shares(used, is_own)
    keys: list[tuple[str, dict[str, Any]]] = [
        (label, {"facecolor": tint(colours[expert])}) for expert, label in own
    ]
    if others:
        keys.append((f"others  {100 * others:.0f} %", {"facecolor": tint(FILLS[-1])}))
    if none > 1e-6:
        keys.append((f"none  {100 * none:.0f} %", {"facecolor": "white", "hatch": "/////"}))
    return colours, keys


def _draw_token(
    axis: "Axes",
    token: _Token,
    top: float,
    weights: Array,
    best: Array,
    colours: list[str],
    fills: list[tuple[float, ...]],
) -> None:
    middle = token.left + token.width / 2
    taken = [int(expert) for expert in best if weights[expert] > 0]
    style = {"facecolor": fills[taken[0]]} if taken else {"hatch": "/////"}
    _box(axis, token.left, top, token.width, _BOX, **{"facecolor": "white", **style})
    axis.text(
        middle,
        top + _BOX / 2 + 0.5,
        token.text,
        fontsize=_FONT,
        family="monospace",
        ha="center",
        va="center",
        parse_math=False,  # a dollar is a dollar
        bbox=None if taken else {"facecolor": "white", "edgecolor": "none", "pad": 0.5},
    )
    _box(axis, token.left, top + _BOX, token.width, _BAR, facecolor=_NONE)
    left = token.left
    for place, expert in enumerate(taken):
        part = token.width * float(weights[expert])
        _box(axis, left, top + _BOX, part, _BAR, facecolor=colours[expert])
        left += part
        axis.text(
            middle,
            top + _BOX + _BAR + (place + 0.5) * _NUMBER + 1.0,
            str(expert),
            fontsize=_SMALL,
            family="monospace",
            ha="center",
            va="center",
            weight="bold" if place == 0 else "normal",
            color="black" if place == 0 else "0.35",
        )


def _box(axis: "Axes", left: float, top: float, width: float, height: float, **style: Any) -> None:
    from matplotlib.patches import Rectangle

    edge = "0.6" if "hatch" in style else "none"
    axis.add_patch(Rectangle((left, top), width, height, edgecolor=edge, linewidth=0.0, **style))
