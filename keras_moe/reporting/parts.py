"""The pictures and lists of the report that apply to a model and its data."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

import keras
import numpy as np

from keras_moe.core.types import Array, Data
from keras_moe.inspection.health import amounts_of
from keras_moe.inspection.records import (
    SLOTS,
    Record,
    example_count,
    examples_at,
    is_by_example,
    is_padding,
    is_soft,
    records_of,
    used_by_example,
    weights_of,
)
from keras_moe.plots import load_over_time
from keras_moe.plots._images import fits_grid, on_grid, pictures_of
from keras_moe.plots.classes import draw_classes, unit_of
from keras_moe.plots.load import draw_load
from keras_moe.plots.pairs import draw_pairs, draw_slots
from keras_moe.plots.patches import draw_patches
from keras_moe.plots.slots import draw_slot_patches
from keras_moe.plots.tasks import draw_gates
from keras_moe.plots.tokens import draw_tokens
from keras_moe.reporting import page
from keras_moe.reporting.labels import Labels
from keras_moe.reporting.summary import Summary
from keras_moe.reporting.top_tokens import top_tokens

_IMAGES = 8
_SLOT_IMAGES, _SLOT_ROWS = 64, 4  # that the means are over, and that are shown
_TOKENS = 400  # of the text that is shown


@dataclass
class Findings:
    """Everything that the report shows.

    Attributes:
        model: the model.
        inputs: its inputs, arrays in a structure.
        labels: of the examples.
        texts: the pieces of text of each example.
        pictures: what to show where the inputs are not images.
        patch_grid: rows and columns of patches.
        history: the file of a monitor.
        records: what the layers decided, by name, in each call.
    """

    model: keras.layers.Layer
    inputs: Data
    labels: Labels | None
    texts: list[list[str]] | None
    pictures: Array | None
    patch_grid: tuple[int, int] | None
    history: str | Path | None
    records: dict[str, Record] = field(default_factory=dict)


def overview_parts(findings: Findings, summaries: Sequence[Summary]) -> list[str]:
    """The load of all layers, now and in training."""
    shares = {}
    for summary in summaries:
        amounts = amounts_of(summary.counts)[1].sum(axis=0)
        shares[summary.name] = amounts / max(amounts.mean(), 1e-12)
    figure = draw_load(shares, "share over the mean")
    parts = [page.picture(figure, "How much each expert gets; 1 is a fair share.")]
    if findings.history is not None:
        caption = "How that went in training, epoch by epoch."
        parts.append(page.picture(load_over_time(findings.history), caption))
    return parts


def layer_parts(findings: Findings, layer: keras.layers.Layer) -> list[str]:
    """The pictures of one layer, for each of its calls."""
    return [
        part
        for name, record in findings.records.items()
        if record.layer is layer
        for part in _record_parts(findings, name, record)
    ]


def _record_parts(findings: Findings, name: str, record: Record) -> list[str]:
    by_example = is_by_example(record, example_count(findings.inputs))
    parts = _class_parts(findings, name, record) if by_example else []
    if hasattr(record.layer, "num_tasks"):
        figure = draw_gates(name, record)
        return [*parts, page.picture(figure, "What each task takes of each expert.")]
    if "experts" in record.fields and record.fields["experts"].shape[-1] > 1:
        figure = draw_pairs(name, record)
        parts.append(page.picture(figure, "Experts that get the same tokens."))
    if getattr(record.layer.router, "phi", None) is not None:
        figure = draw_slots(name, record.layer)
        parts.append(page.picture(figure, "Slots that are alike mix the same tokens."))
    if not by_example:
        return parts
    weights = weights_of(record)
    parts += _text_parts(findings, name, record, weights)
    parts += _patch_parts(findings, name, record, weights)
    return parts + _slot_parts(findings, name, weights) if is_soft(record) else parts


def _class_parts(findings: Findings, name: str, record: Record) -> list[str]:
    if findings.labels is None:
        return []
    used = used_by_example(record)
    codes, names = findings.labels
    by_class = np.array([used[codes == code].sum(axis=0) for code in range(len(names))])
    figure = draw_classes(name, by_class, names, unit_of(record))
    return [page.picture(figure, "Which classes use which expert.")]


def _text_parts(findings: Findings, name: str, record: Record, weights: Array) -> list[str]:
    """The typical tokens of each expert, and the beginning of a text in their colours."""
    typical = None if findings.texts is None else top_tokens(weights, findings.texts)
    if findings.texts is None or typical is None:
        return []
    rows = [
        (str(expert), " ".join(_token(text, share) for text, share in tokens))
        for expert, tokens in enumerate(typical)
    ]
    parts = [page.table(("expert", "typical tokens, and how much of each it gets"), rows, "words")]
    # What was routed with the batch, and not the text alone: with a capacity that is another.
    first = record._replace(fields={key: value[:1] for key, value in record.fields.items()})
    of_text, texts = _without_padding(first, findings.texts[0])
    figure = draw_tokens(name, of_text[:_TOKENS], texts[:_TOKENS], is_soft=is_soft(record))
    return [*parts, page.picture(figure, "The first text, in the colours of its experts.")]


def _without_padding(record: Record, texts: list[str]) -> tuple[Array, list[str]]:
    """The weights and pieces of a text, without the padding before and behind it."""
    real = np.flatnonzero(~is_padding(record)[0, : len(texts)])
    inside = slice(real[0], real[-1] + 1) if len(real) else slice(0)
    return weights_of(record)[0][inside], texts[inside]


def _token(text: str, share: float) -> str:
    shown = escape(text.replace("\n", "↵").replace(" ", "·"))
    return f'<span class="token">{shown} <small>{100 * share:.0f} %</small></span>'


def _patch_parts(findings: Findings, name: str, record: Record, weights: Array) -> list[str]:
    """Some images, one of each class where there are classes, in the colours of their experts."""
    images = findings.inputs if findings.pictures is None else findings.pictures
    grid = findings.patch_grid
    if not fits_grid(weights, grid, images):
        return []
    chosen, titles = _one_per_class(findings.labels, len(weights), _IMAGES)
    shown = pictures_of(np.asarray(images)[chosen], None)
    on_images = on_grid(weights[chosen], grid, shown.shape[1:3])
    figure = draw_patches(name, on_images, shown, titles, _IMAGES, is_soft=is_soft(record))
    return [page.picture(figure, "Images, and the experts that their patches take.")]


def _slot_parts(findings: Findings, name: str, weights: Array) -> list[str]:
    """What the slots of a soft layer are made of, for the first images."""
    images = findings.inputs if findings.pictures is None else findings.pictures
    if not fits_grid(weights, findings.patch_grid, images):
        return []
    count = min(len(weights), _SLOT_IMAGES)
    chosen, titles = _one_per_class(findings.labels, count, _SLOT_ROWS)
    inputs = examples_at(findings.inputs, slice(count))
    record = records_of(findings.model, inputs, count, SLOTS)[name]
    if record.fields["dispatch"].ndim != 4:  # a causal layer, where each token has its own slots
        return []
    shown = pictures_of(np.asarray(images)[:count], None)
    figure = draw_slot_patches(
        name, record, shown, chosen, patch_grid=findings.patch_grid, titles=titles
    )
    return [page.picture(figure, "Images, and what each slot takes of their patches.")]


def _one_per_class(
    labels: Labels | None, count: int, most: int
) -> tuple[list[int], list[str] | None]:
    """Places of examples, the first of each class where there are classes, and their titles."""
    if labels is None:
        return list(range(min(most, count))), None
    codes, names = labels.codes[:count], labels.names
    firsts = {code: np.flatnonzero(codes == code)[:1] for code in range(len(names))}
    found = [(int(places[0]), names[code]) for code, places in firsts.items() if len(places)]
    return [place for place, _ in found[:most]], [name for _, name in found[:most]]
