"""The report about a model's experts."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import keras

from keras_moe.core import checks
from keras_moe.core.types import Array, Data
from keras_moe.inspection.mixtures import named_layers, watched
from keras_moe.inspection.recording import count_routing
from keras_moe.inspection.records import GATES, SOFT, SPARSE, example_count, records_of
from keras_moe.plots._canvas import new_figure
from keras_moe.reporting import page, tables
from keras_moe.reporting.gather import gather
from keras_moe.reporting.labels import labels_of
from keras_moe.reporting.last_epoch import last_epoch
from keras_moe.reporting.parts import Findings, layer_parts, overview_parts
from keras_moe.reporting.summary import summarize
from keras_moe.reporting.top_tokens import texts_of


def report(
    model: keras.layers.Layer,
    data: Data,
    path: str | Path,
    *,
    labels: Sequence[int] | Sequence[str] | Array | None = None,
    class_names: Sequence[str] | None = None,
    texts: Sequence[Sequence[str]] | None = None,
    vocabulary: Sequence[str] | Mapping[int, str] | None = None,
    pictures: Array | None = None,
    patch_grid: tuple[int, int] | None = None,
    history: str | Path | None = None,
    title: str | None = None,
    max_examples: int = 512,
    batch_size: int = 64,
) -> Path:
    """Writes a page of HTML about what a model's experts do with some data.

    The page stands alone: no script, no network, pictures inside; it is made to be read on light
    and dark screens and to be printed. It has, of what applies:

    - per mixture layer experts, parameters, the numbers of `ExpertMonitor` on these data and in the
      last epoch of training, those out of their healthy range in another colour, and, as its alarms
      say it, what is wrong and what to try;
    - the load of all layers, and how it went in training, from the monitor's file;
    - per layer, which classes, tasks, tokens and patches use which expert, which experts work
      together, and which slots are alike.

    The model is called as in inference, without compiling it, and left as it was.

    Args:
        model: A built model of any kind with mixture layers.
        data: Its inputs, an array, a dict or a list of arrays; a tuple (inputs, labels); or what
            gives batches of these, such as a `keras.utils.PyDataset` or a `tf.data.Dataset`.
        path: The file to write.
        labels: Optional class, user group or the like of each example, `(n,)`, integers or strings.
            None for integers that come with the data. Defaults to `None`.
        class_names: Names of the labels 0, 1, ...; None for the labels. Defaults to `None`.
        texts: Optional pieces of text that the tokens of each example stand for, n sequences of
            strings. Defaults to `None`.
        vocabulary: Optional texts by token id, a sequence or a dict, in place of `texts` where
            inputs are ids. Defaults to `None`.
        pictures: Optional images `(n, height, width)` or `(n, height, width, channels)` to show
            where the inputs are patches. Defaults to `None`.
        patch_grid: Rows and columns of patches; None for the grid of the image's shape. Defaults to
            `None`.
        history: Optional file that `ExpertMonitor(json=...)` wrote. Defaults to `None`.
        title: Title of the page; None for the model's name. Defaults to `None`.
        max_examples: Positive integer, how many examples are read. Defaults to `512`.
        batch_size: Positive integer, examples per call of the model. Defaults to `64`.

    Returns:
        The path.

    Raises:
        ValueError: where the model is none or has no mixture layer that is built, the data no
            example, labels do not fit them, or the history is of another model.
        ImportError: without matplotlib.

    Example:

    >>> import keras, keras_moe, numpy as np, pathlib, tempfile
    >>> model = keras.Sequential([keras_moe.layers.MoE(4, 8, name="moe"), keras.layers.Dense(2)])
    >>> x = np.random.default_rng(0).normal(size=(64, 8)).astype("float32")
    >>> model.build(x.shape)
    >>> page = pathlib.Path(tempfile.mkdtemp()) / "experts.html"
    >>> keras_moe.report(model, x, page, labels=(x[:, 0] > 0).astype(int)).name
    'experts.html'
    """
    new_figure(1.0, 1.0)  # says what to install before the work begins
    watched("model", model)
    checks.positive_int("batch_size", batch_size)
    x, y = gather(data, checks.positive_int("max_examples", max_examples))
    count = example_count(x)
    named = named_layers(model)
    last = None if history is None else last_epoch(history, named)
    findings = Findings(
        model=model,
        inputs=x,
        labels=labels_of(labels, y, count, class_names),
        texts=texts_of(x, texts, vocabulary),
        pictures=None if pictures is None else pictures[:count],
        patch_grid=patch_grid,
        history=history,
    )
    with count_routing(model) as counts:
        findings.records |= records_of(model, x, batch_size, SPARSE, SOFT, GATES)
    # As the data met them: a subclassed model lists its layers by their attributes.
    met = [id(record.layer) for record in findings.records.values()]
    named.sort(key=lambda pair: met.index(id(pair[1])) if id(pair[1]) in met else len(met))
    summaries = [summarize(name, layer, counts[name], last) for name, layer in named]
    parts = [tables.lead(model, count, findings.labels, summaries), *tables.overview(summaries)]
    parts += overview_parts(findings, summaries)
    for number, summary in enumerate(summaries):
        parts += [tables.heading(number, summary), *layer_parts(findings, summary.layer)]
    html = page.page(title or f"Experts of {model.name}", [*parts, tables.glossary(summaries)])
    path = Path(path)
    path.write_text(html, encoding="utf-8")
    return path
