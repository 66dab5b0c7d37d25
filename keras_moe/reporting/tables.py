"""Tables and text of the report."""

import math
from collections.abc import Sequence

import keras

from keras_moe.flops.active_parameters import active_parameters
from keras_moe.inspection.health import NAMES
from keras_moe.inspection.mixtures import is_of_keras_3
from keras_moe.reporting import page
from keras_moe.reporting.labels import Labels
from keras_moe.reporting.summary import MEANINGS, Summary, all_parameters
from keras_moe.version import __version__


def lead(
    model: keras.layers.Layer, count: int, labels: Labels | None, summaries: Sequence[Summary]
) -> str:
    """The introduction of the report."""
    classes = "" if labels is None else f" of {len(labels.names)} classes"
    if is_of_keras_3(model):
        parameters, active = all_parameters(model), active_parameters(model)
    else:
        parameters = sum(math.prod(weight.shape) for weight in model.trainable_weights)
        active = parameters - sum(each.parameters - each.active for each in summaries)
    return (
        f'<p class="faint">{page.words(type(model).__name__)} with '
        f"{page.number(parameters)} parameters, of which a token meets "
        f"{page.number(active)}. On {page.number(count)} examples{classes}; "
        f"{keras.backend.backend()}, Keras {keras.__version__}, keras_moe {__version__}.</p>"
    )


def _verdict(summaries: Sequence[Summary]) -> str:
    count = len(summaries)
    layers = f"{count} mixture layer{'s' * (count > 1)}"
    ill = [summary for summary in summaries if not summary.is_well]
    alarms = sum(len(summary.alarms) for summary in ill)
    if not ill:
        return f"<p>No alarm in {layers}.</p>"
    return f"<p>{alarms} alarm{'s' * (alarms > 1)} in {len(ill)} of {layers}.</p>"


def overview(summaries: Sequence[Summary]) -> list[str]:
    """The alarms, the layers and their numbers."""
    head = ("layer", "kind", "experts", "parameters", "active")
    what = [
        (
            page.words(summary.name),
            page.words(summary.kind),
            page.words(summary.experts),
            page.number(summary.parameters),
            page.number(summary.active),
        )
        for summary in summaries
    ]
    names = _names(summaries)
    numbers = [
        (page.words(summary.name), *(page.number(summary.numbers.get(name)) for name in names))
        for summary in summaries
    ]
    alarms = [
        (
            f'<a href="#layer-{number}">{page.words(summary.name)}</a>',
            f'<span class="{_mood(summary)}">{page.words(alarm)}</span>',
        )
        for number, summary in enumerate(summaries)
        for alarm in summary.alarms
    ]
    return [
        _verdict(summaries),
        page.table(("layer", "state"), alarms, "words"),
        page.table(head, what),
        page.table(("layer", *(name.replace("_", " ") for name in names)), numbers),
    ]


def _mood(summary: Summary) -> str:
    if not summary.is_judged:
        return "faint"
    return "well" if summary.is_well else "ill"


def _names(summaries: Sequence[Summary]) -> list[str]:
    """The numbers that any layer has."""
    return [name for name in NAMES if any(name in summary.numbers for summary in summaries)]


def heading(number: int, summary: Summary) -> str:
    """The beginning of a layer's part."""
    return (
        f'<h2 id="layer-{number}">{page.words(summary.name)}</h2>'
        f'<p class="faint">{page.words(summary.kind)}, experts: {page.words(summary.experts)}.</p>'
    )


def glossary(summaries: Sequence[Summary]) -> str:
    """The meaning of the numbers that the layers have."""
    named = [name for name in _names(summaries) if name in MEANINGS]
    terms = "".join(
        f"<dt>{page.words(name.replace('_', ' '))}</dt><dd>{page.words(MEANINGS[name])}</dd>"
        for name in named
    )
    return f"<h2>What the numbers say</h2><dl>{terms}</dl>"
