"""Records of the routing in the calls of a whole model."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import keras
from keras import ops

from keras_moe.core import checks
from keras_moe.inspection.health import Counts, difference
from keras_moe.inspection.mixtures import named_layers, sync_state


@contextmanager
def record_routing(model: keras.layers.Layer) -> Iterator[dict[str, list[Any]]]:
    """Collects what every mixture layer of a model decides, in the calls inside the context.

    Call the model itself, which is eager: `predict` and `fit` compile it, and what they decide
    cannot be read. The context says so at its end.

    Args:
        model: A built model of any kind, or a layer.

    Returns:
        A context that gives a dict: by layer name ("moe", then "moe#2" for a second "moe"), a
        record of NumPy arrays per call, as `return_routing=True` would give it: a
        `keras_moe.Routing`, `SoftRouting` or `GateRouting`. A layer that the model calls twice has
        two records per call of the model. Layers stand in the order in which data met them, behind
        those that were not called.

    Raises:
        ValueError: where the model is none or has no mixture layer that is built; at the end of the
            context, where the model was called compiled, or no mixture was called.

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
    records: dict[str, list[Any]] = {}
    unread: list[str] = []
    with _watching(model) as (named, restored):
        for name, layer in named:
            records[name] = []
            restored.enter_context(listening(layer, _appender(name, records, unread)))
        try:
            yield records
        except Exception as error:
            if unread:  # which the error may come from
                raise _not_eager(unread) from error
            raise
        if unread or not any(records.values()):
            raise _not_eager(unread)


@contextmanager
def _watching(
    model: keras.layers.Layer,
) -> Iterator[tuple[list[tuple[str, keras.layers.Layer]], ExitStack]]:
    """Gives the mixtures by name, and a stack for what is undone at the end.

    Inside, `predict`, `evaluate` and `fit` compile programs of their own: those compiled before see
    nothing of the context, and those compiled inside must not outlive it.
    """
    named = named_layers(model)
    if not named:
        checks.fail(
            "`model` must have a mixture layer that is built: call it once.", model=model.name
        )
    sync_state(model)
    with ExitStack() as restored:
        for trainer in model._flatten_layers():
            if isinstance(trainer, keras.Model):
                restored.enter_context(_compiling_anew(trainer))
        yield named, restored


@contextmanager
def _compiling_anew(trainer: Any) -> Iterator[None]:
    """Takes a model's programs away, and gives them back at the end."""
    programs = {
        name: getattr(trainer, name)
        for name in ("train_function", "test_function", "predict_function")
    }
    # JAX knows a method that it has compiled, and a new function not.
    steps = {name: partial(getattr(trainer, name)) for name in ("train_step", "test_step")}
    own = {name: vars(trainer)[name] for name in steps if name in vars(trainer)}
    for name, value in {**dict.fromkeys(programs), **steps}.items():
        setattr(trainer, name, value)
    try:
        yield
    finally:
        for name in steps:
            delattr(trainer, name)
        for name, value in {**programs, **own}.items():
            setattr(trainer, name, value)


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
    called: list[Any] = []
    with _watching(model) as (named, restored):
        counting = [
            (name, layer, restored.enter_context(_counting(layer))) for name, layer in named
        ]
        for _, layer in named:
            restored.enter_context(listening(layer, called.append))
        yield counts
        if not called:
            checks.fail(
                "`count_routing` counts the calls inside of it: call the model there, and not by a "
                "function that was compiled before.",
                calls=0,
            )
        for name, layer, before in counting:
            counts[name] = difference(layer.running_counts(), before)


@contextmanager
def evaluating_anew(model: keras.Model) -> Iterator[None]:
    """Lets `evaluate` compile a program of its own, in which layers count if they are told to."""
    before, own = model.test_function, vars(model).get("test_step")
    model.test_step = partial(model.test_step)  # JAX knows a method that it has compiled
    model.make_test_function(force=True)
    try:
        yield
    finally:
        model.test_function = before
        del model.test_step
        if own is not None:
            model.test_step = own


@contextmanager
def counting_apart(
    named: list[tuple[str, keras.layers.Layer]],
) -> Iterator[Callable[[], dict[str, Counts]]]:
    """Lets layers count in inference; gives a function that reads what was counted inside.

    The layers' own counts are left as they were.
    """
    with ExitStack() as restored:
        before = {name: restored.enter_context(_counting(layer)) for name, layer in named}
        yield lambda: {
            name: difference(layer.running_counts(), before[name]) for name, layer in named
        }


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


def _appender(name: str, records: dict[str, list[Any]], unread: list[str]) -> Callable[[Any], None]:
    def append(record: Any) -> None:
        try:
            arrays = keras.tree.map_structure(ops.convert_to_numpy, record)
            if not records[name]:
                records[name] = records.pop(name)  # behind those that were called before
            records[name].append(arrays)
        except Exception as error:  # a tracer of jit, or a tensor of a graph
            # Raised at the end: JAX's `fit` and `predict` would leave a model without its weights.
            unread.append(type(error).__name__)

    return append


def _not_eager(unread: list[str]) -> ValueError:
    return ValueError(
        "`record_routing` reads what an eager call decides: call `model(x)` inside of it, not "
        "`predict` or `fit`, and not where the backend compiles a part of that call, as JAX does "
        f"an RNN and `keras.remat`. Received: {unread[0] if unread else 'no call of a mixture'}"
    )
