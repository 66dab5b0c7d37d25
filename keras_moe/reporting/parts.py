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
    Record,
    example_count,
    examples_at,
    is_by_example,
    used_by_example,
    weights_of,
)
from keras_moe.plots import load_over_time, patch_experts, token_experts
from keras_moe.plots.classes import draw_classes, unit_of
from keras_moe.plots.load import draw_load
from keras_moe.plots.pairs import draw_pairs, draw_slots
from keras_moe.plots.patches import fits_grid
from keras_moe.plots.tasks import draw_gates
from keras_moe.reporting import page
from keras_moe.reporting.labels import Labels
from keras_moe.reporting.summary import Summary
from keras_moe.reporting.top_tokens import top_tokens

_IMAGES = 8
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
    return [*parts, *_text_parts(findings, name, weights), *_patch_parts(findings, name, weights)]


def _class_parts(findings: Findings, name: str, record: Record) -> list[str]:
    if findings.labels is None:
        return []
    used = used_by_example(record)
    codes, names = findings.labels
    by_class = np.array([used[codes == code].sum(axis=0) for code in range(len(names))])
    figure = draw_classes(name, by_class, names, unit_of(record))
    return [page.picture(figure, "Which classes use which expert.")]


def _text_parts(findings: Findings, name: str, weights: Array) -> list[str]:
    """The typical tokens of each expert, and the beginning of a text in their colours."""
    typical = None if findings.texts is None else top_tokens(weights, findings.texts)
    if findings.texts is None or typical is None:
        return []
    rows = [
        (str(expert), " ".join(_token(text, share) for text, share in tokens))
        for expert, tokens in enumerate(typical)
    ]
    parts = [page.table(("expert", "typical tokens, and how much of each it gets"), rows, "words")]
    first = examples_at(findings.inputs, slice(1))
    texts = findings.texts[0]
    texts = texts + [""] * (weights.shape[1] - len(texts))
    figure = token_experts(findings.model, first, texts, layer=name, most=_TOKENS)
    return [*parts, page.picture(figure, "The first text, in the colours of its experts.")]


def _token(text: str, share: float) -> str:
    shown = escape(text.replace("\n", "↵").replace(" ", "·"))
    return f'<span class="token">{shown} <small>{100 * share:.0f} %</small></span>'


def _patch_parts(findings: Findings, name: str, weights: Array) -> list[str]:
    """Some images, one of each class where there are classes, in the colours of their experts."""
    images = findings.inputs if findings.pictures is None else findings.pictures
    if not fits_grid(weights, findings.patch_grid, images):
        return []
    chosen, titles = list(range(min(_IMAGES, len(weights)))), None
    if findings.labels is not None:
        codes, names = findings.labels
        chosen = [int(np.flatnonzero(codes == code)[0]) for code in range(len(names))][:_IMAGES]
        titles = [names[codes[index]] for index in chosen]
    figure = patch_experts(
        findings.model,
        examples_at(findings.inputs, chosen),
        layer=name,
        patch_grid=findings.patch_grid,
        pictures=np.asarray(images)[chosen],
        titles=titles,
    )
    return [page.picture(figure, "Images, and the experts that their patches take.")]
