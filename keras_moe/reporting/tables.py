"""Tables and text of the report."""

import math
from collections.abc import Sequence

import keras

from keras_moe.flops.active_parameters import active_parameters
from keras_moe.inspection.health import NAMES
from keras_moe.inspection.mixtures import is_of_keras_3
from keras_moe.inspection.ranges import SOURCES, Range
from keras_moe.reporting import page
from keras_moe.reporting.labels import Labels
from keras_moe.reporting.summary import MEANINGS, State, Summary, all_parameters
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
        f'<p class="faint">{page.words(model.name)} with '
        f"{page.number(parameters)} parameters, of which a token meets "
        f"{page.number(active)}. On {page.number(count)} examples{classes}; "
        f"{keras.backend.backend()}, Keras {keras.__version__}, keras_moe {__version__}.</p>"
    )


def _verdict(summaries: Sequence[Summary]) -> str:
    count = len(summaries)
    layers = f"{count} mixture layer{'s' * (count > 1)}"
    ill = [[state for state in summary.states if not state.is_well] for summary in summaries]
    if any(ill):
        return f"<p>Alarms in {sum(map(bool, ill))} of {layers}.</p>"
    judged = sum(any(state.is_judged for state in summary.states) for summary in summaries)
    return f"<p>No alarm in {layers}, of which {judged} could be judged.</p>"


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
        (page.words(_row_name(summary, state)), *(_cell(state, name) for name in names))
        for summary in summaries
        for state in summary.states
    ]
    alarms = [
        (
            f'<a href="#layer-{number}">{page.words(_row_name(summary, state))}</a>',
            f'<span class="{_mood(state)}">{page.words(alarm)}</span>',
        )
        for number, summary in enumerate(summaries)
        for state in summary.states
        for alarm in state.alarms
    ]
    return [
        _verdict(summaries),
        page.table(("layer", "state"), alarms, "words"),
        page.table(head, what),
        page.table(("layer", *(name.replace("_", " ") for name in names)), numbers),
    ]


def _row_name(summary: Summary, state: State) -> str:
    return f"{summary.name}, {state.place}" if state.place else summary.name


def _mood(state: State) -> str:
    if not state.is_judged:
        return "faint"
    return "well" if state.is_well else "ill"


def _cell(state: State, name: str) -> str:
    """A number, in the colour that says whether it is in its healthy range."""
    value = state.numbers.get(name)
    shown = page.number(value)
    if value is None or name not in state.ranges:
        return shown
    healthy = state.ranges[name]
    mood = "well" if value in healthy else "ill"
    title = f"healthy: {_limits(healthy)}"
    return f'<span class="{mood}" title="{title}">{shown}</span>'


def _limits(healthy: Range) -> str:
    if healthy.low == healthy.high:
        return f"{healthy.low:.3g}"
    return f"at most {healthy.high:.3g}" if healthy.low == 0 else f"at least {healthy.low:.3g}"


def _names(summaries: Sequence[Summary]) -> list[str]:
    """The numbers that any layer has."""
    found = {name for summary in summaries for state in summary.states for name in state.numbers}
    return [name for name in NAMES if name in found]


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
        f"<dt>{page.words(name.replace('_', ' '))}</dt><dd>{page.words(_meaning(name))}</dd>"
        for name in named
    )
    return f"<h2>What the numbers say</h2><dl>{terms}</dl>"


def _meaning(name: str) -> str:
    return f"{MEANINGS[name]}. Healthy: {SOURCES.get(name, 'any')}."
