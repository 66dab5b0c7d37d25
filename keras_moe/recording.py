"""Who went where, in the calls of a whole model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
from keras import ops

from keras_moe import _checks
from keras_moe._mixtures import mixture_layers, unique_names


@contextmanager
def record_routing(model: Any) -> Iterator[dict[str, list[Any]]]:
    """Collects what every mixture layer of a model decides, in the calls inside the context.

    Call the model itself, which is eager: `predict` and `fit` compile it, and what they decide
    cannot be read.

    Args:
        model: A built model, or one of our layers.

    Returns:
        A context that gives a dict: by layer name ("moe", then "moe#2" for a second "moe"), a
        record of NumPy arrays per call, as `return_routing=True` would give it: a
        `keras_moe.Routing`, `SoftRouting` or `GateRouting`.

    Raises:
        ValueError: where the model has no mixture layer that is built, or is called compiled.

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
    named = unique_names(mixture_layers(model))
    if not named:
        _checks.fail(
            "`model` must have a mixture layer that is built: call it once.", model=model.name
        )
    records: dict[str, list[Any]] = {name: [] for name, _ in named}
    try:
        for name, layer in named:
            layer._recorder = _appender(records[name])
        yield records
    finally:
        for _, layer in named:
            layer._recorder = None


@contextmanager
def count_routing(model: Any) -> Iterator[dict[str, dict[str, Any]]]:
    """Lets every mixture layer count in inference too, in the calls inside the context.

    Args:
        model: A built model, or one of our layers.

    Returns:
        A context that gives a dict, filled at its end: by layer name, what `running_counts` would
        say of these calls alone. The layers' own counts are left as they were.
    """
    named = unique_names(mixture_layers(model))
    found: dict[str, dict[str, Any]] = {}
    before = {name: _counters(layer) for name, layer in named}
    try:
        for _, layer in named:
            layer.reset_running_counts()
            layer._counts_always = True
        yield found
        found |= {name: layer.running_counts() for name, layer in named}
    finally:
        for name, layer in named:
            layer._counts_always = False
            for variable, value in before[name]:
                variable.assign(value)


def _counters(layer: Any) -> list[tuple[Any, Any]]:
    """The weights that a layer counts in, and copies of their values."""
    return [(each, ops.convert_to_numpy(each).copy()) for each in layer._non_trainable_variables]


def _appender(records: list[Any]) -> Callable[[Any], None]:
    def append(record: Any) -> None:
        try:
            records.append(keras.tree.map_structure(ops.convert_to_numpy, record))
        except Exception as error:  # a tracer of jit, or a tensor of a graph
            raise ValueError(
                "`record_routing` reads what an eager call decides: call `model(x)`, not "
                f"`predict` or `fit`. Received: {type(error).__name__}"
            ) from error

    return append
