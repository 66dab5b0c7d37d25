"""Records of the routing in the calls of a whole model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
from keras import ops

from keras_moe.core import checks
from keras_moe.inspection.health import Counts
from keras_moe.inspection.mixtures import named_layers


@contextmanager
def record_routing(model: keras.layers.Layer) -> Iterator[dict[str, list[Any]]]:
    """Collects what every mixture layer of a model decides, in the calls inside the context.

    Call the model itself, which is eager: `predict` and `fit` compile it, and what they decide
    cannot be read.

    Args:
        model: A built model of any kind, or a layer.

    Returns:
        A context that gives a dict: by layer name ("moe", then "moe#2" for a second "moe"), a
        record of NumPy arrays per call, as `return_routing=True` would give it: a
        `keras_moe.Routing`, `SoftRouting` or `GateRouting`. A layer that the model calls twice has
        two records per call of the model.

    Raises:
        ValueError: where the model is none, has no mixture layer that is built, or is called
            compiled.

    Example:

    >>> import keras, keras_moe, numpy as np
    >>> model = keras.Sequential([keras_moe.layers.MoE(4, 8, name="moe"), keras.layers.Dense(1)])
    >>> x = np.ones((6, 8), "float32")
    >>> model.build(x.shape)
    >>> with keras_moe.record_routing(model) as records:
    ...     outputs = model(x)
    >>> records["moe"][0].experts.shape
    (6, 2)
    """
    named = _named_mixtures(model)
    records: dict[str, list[Any]] = {name: [] for name, _ in named}
    with ExitStack() as restored:
        for name, layer in named:
            restored.enter_context(listening(layer, _appender(records[name])))
        yield records


@contextmanager
def listening(layer: keras.layers.Layer, listener: Callable[[Any], None]) -> Iterator[None]:
    """Passes the record of every call of a mixture layer to a function."""
    before = layer.recorder

    def both(record: Any) -> None:
        listener(record)
        if before is not None:
            before(record)

    layer.recorder = both
    try:
        yield
    finally:
        layer.recorder = before


@contextmanager
def count_routing(model: keras.layers.Layer) -> Iterator[dict[str, Counts]]:
    """Lets every mixture layer count in inference too, in the calls inside the context.

    Args:
        model: A built model of any kind, or a layer.

    Returns:
        A context that gives a dict, filled at its end: by layer name, what `running_counts` would
        say of these calls alone. The layers' own counts are left as they were.

    Raises:
        ValueError: where the model is none, or has no mixture layer that is built.
    """
    counts: dict[str, Counts] = {}
    with ExitStack() as restored:
        counting = [
            (name, layer, restored.enter_context(_counting(layer)))
            for name, layer in _named_mixtures(model)
        ]
        yield counts
        for name, layer, before in counting:
            now = layer.running_counts()
            counts[name] = {key: value - before[key] for key, value in now.items()}


@contextmanager
def _counting(layer: keras.layers.Layer) -> Iterator[Counts]:
    """Lets a layer count in inference; gives its counts before."""
    if layer.counts_always:  # for a context around this one, which wants these calls too
        yield layer.running_counts()
        return
    before = [
        (variable, ops.convert_to_numpy(variable).copy())
        for variable in layer._non_trainable_variables
    ]
    layer.counts_always = True
    layer.reset_running_counts()  # small sums keep their digits
    try:
        yield layer.running_counts()
    finally:
        layer.counts_always = False
        for variable, value in before:
            variable.assign(value)


def _named_mixtures(model: keras.layers.Layer) -> list[tuple[str, keras.layers.Layer]]:
    named = named_layers(model)
    if not named:
        checks.fail(
            "`model` must have a mixture layer that is built: call it once.", model=model.name
        )
    return named


def _appender(records: list[Any]) -> Callable[[Any], None]:
    def append(record: Any) -> None:
        try:
            records.append(keras.tree.map_structure(ops.convert_to_numpy, record))
        except Exception as error:  # a tracer of jit, or a tensor of a graph
            raise ValueError(
                "`record_routing` reads what an eager call decides: call `model(x)`, not "
                "`predict` or `fit`; and not where the backend compiles a part of that call, as "
                f"JAX does an RNN and `keras.remat`. Received: {type(error).__name__}"
            ) from error

    return append
