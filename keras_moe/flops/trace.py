"""Counts the products that a layer's call asks of `keras.ops`, without running it."""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any, NoReturn

import keras
from keras import ops
from keras.src import backend

from keras_moe.core import checks
from keras_moe.flops.products import FORMULAS, Formula

Rule = Callable[..., int]
# The rule to apply, or None to follow the call, and whether a matrix without a product is right.
FindRule = Callable[[keras.layers.Layer], tuple[Rule | None, bool]]

# What is inside of these is traced once, or all branches of it, however often it runs.
_LOOPS = (
    "associative_scan",
    "cond",
    "fori_loop",
    "map",
    "scan",
    "switch",
    "vectorized_map",
    "while_loop",
)
_lock = threading.RLock()
_current: ContextVar["_Trace | None"] = ContextVar("keras_moe_trace", default=None)


def traced_flops(
    layer: keras.layers.Layer,
    inputs: Any,
    arguments: dict[str, Any],
    find_rule: FindRule,
    trusts_layer: bool,
) -> int:
    """Counts the FLOPs of the products of `layer(*inputs, **arguments)`.

    The call is traced on shapes alone, as Keras does to find an output's shape: nothing is
    computed, and what layers count or add as a loss is thrown away.

    Args:
        layer: a built layer or model.
        inputs: a tuple of (nested) `keras.KerasTensor` of known shapes.
        arguments: keyword arguments of the call.
        find_rule: says what to do with a layer that is called inside of `layer`.
        trusts_layer: whether it is right if `layer` has a matrix and no product.
    """
    checks.keras_layer("layer", layer)
    check_sizes((inputs, arguments))
    trace = _Trace(layer, find_rule, trusts_layer)

    class Probe(keras.layers.Layer):
        def call(self, *inputs: Any) -> Any:
            if trace.error is not None:  # torch tries again on another device
                raise trace.error
            trace.flops = 0
            with _activated(trace):
                return layer(*inputs, **arguments)

    # With a name, or Keras would number the user's next layer differently. Called as a layer: Keras
    # clears the losses of the outermost one.
    probe = Probe(name="probe", dtype="float32", autocast=False)
    with _hooks():
        try:
            probe(*inputs)
        except Exception as error:
            if trace.error is None or trace.error is error:
                raise
            raise trace.error from None  # Keras wraps it in the story of its own calls
    return trace.flops


def check_sizes(inputs: Any) -> None:
    """Fails if a size is unknown: some backends would put any number in its place."""
    shapes = [tuple(leaf.shape) for leaf in keras.tree.flatten(inputs) if _is_tensor(leaf)]
    if any(None in shape for shape in shapes):
        checks.fail("`inputs` must have known sizes.", shapes=shapes)


class _Trace:
    """The state of one traced call."""

    def __init__(self, root: keras.layers.Layer, find_rule: FindRule, trusts_root: bool) -> None:
        self.flops = 0
        self.error: Exception | None = None
        self._root, self._find_rule, self._trusts_root = root, find_rule, trusts_root
        self._calls: list[keras.layers.Layer] = []  # from the outermost to the one that runs
        self._has_product = False  # of the layer that runs, not of those that it calls
        self._is_in_product = False
        self._loop: str | None = None

    def layer_call(self, call: Any, layer_and_args: Any, kwargs: Any) -> Any:
        """Applies a layer's rule, or goes on into its call."""
        layer, *args = layer_and_args
        rule, is_trusted = None, self._trusts_root
        if self._calls or layer is not self._root:
            rule, is_trusted = self._find_rule(layer)
        if rule is not None:
            return self._apply(rule, layer, args, kwargs)
        if not layer.built and type(layer).build is not keras.layers.Layer.build:
            self._fail(
                f"`{layer.name}` ({type(layer).__name__}) must be built: call the model once.",
                built=False,
            )
        self._calls.append(layer)
        has_product, self._has_product = self._has_product, False
        try:
            outputs = call(layer, *args, **kwargs)
            if not (self._has_product or is_trusted):
                self._check_has_no_matrix(layer)
        finally:
            self._calls.pop()
            self._has_product = has_product
        return outputs

    def product(self, function: Any, args: Any, kwargs: Any, formula: Formula) -> Any:
        """Counts a product. Products inside another one belong to it."""
        if self._is_in_product:
            return function(*args, **kwargs)
        self._is_in_product = self._has_product = True
        try:
            output = function(*args, **kwargs)
        finally:
            self._is_in_product = False
        specs = keras.tree.map_structure(_as_spec, (output, args, kwargs))
        if any(None in spec.shape for spec in keras.tree.flatten(specs) if _is_tensor(spec)):
            self._fail_in_call("has a product of unknown size")
        self._add(formula(specs[0], *specs[1], **specs[2]))
        return output

    def loop(self, function: Any, args: Any, kwargs: Any, name: str) -> Any:
        """Runs what a backend may trace once, whatever its trip count."""
        outer, self._loop = self._loop, name
        try:
            return function(*args, **kwargs)
        finally:
            self._loop = outer

    def _apply(self, rule: Rule, layer: Any, args: Any, kwargs: Any) -> Any:
        """Counts by the rule, and returns zeros of the shape of the layer's output."""
        first = next(iter((*args, *kwargs.values())))
        masks = keras.tree.map_structure(backend.get_keras_mask, first)
        args, kwargs = keras.tree.map_structure(_as_spec, (args, kwargs))
        with _activated(None):
            try:
                flops = rule(layer, *args, **kwargs)
            except Exception as error:
                self.error = error
                raise
            specs = layer.compute_output_spec(*args, **kwargs)
        self._add(flops)
        outputs = keras.tree.map_structure(lambda spec: ops.zeros(spec.shape, spec.dtype), specs)
        if layer.supports_masking:  # what comes later may insist on a mask
            layer._set_mask_metadata(first, outputs, masks)
        return outputs

    def _add(self, flops: int) -> None:
        if flops and self._loop is not None:
            self._fail_in_call(
                f"has products inside of `keras.ops.{self._loop}`, whose number of rounds is not "
                "known here"
            )
        self.flops += flops

    def _check_has_no_matrix(self, layer: Any) -> None:
        nested = {id(v) for sub in layer._flatten_layers(include_self=False) for v in sub.weights}
        for weight in layer.weights:
            if id(weight) not in nested and sum(size > 1 for size in weight.shape) >= 2:
                self._fail_in_call(
                    "has a matrix and asks no product of `keras.ops` (`@` is not seen): its "
                    "FLOPs are not known",
                    **{weight.name: tuple(weight.shape)},
                )

    def _fail_in_call(self, what: str, **received: Any) -> NoReturn:
        layer = self._calls[-1] if self._calls else self._root
        name = type(layer).__name__
        self._fail(
            f"`{layer.name}` ({name}) {what}. Register a rule: `@layer_flops.register` on a "
            f"function `(layer: {name}, *inputs, **arguments) -> int`, or, where `keras.ops` is "
            f"asked for all it multiplies, `layer_flops.register({name}, count_products)`.",
            **(received or {"layer": layer}),
        )

    def _fail(self, expectation: str, **received: Any) -> NoReturn:
        try:
            checks.fail(expectation, **received)
        except ValueError as error:
            self.error = error
            raise


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")


def _as_spec(value: Any) -> Any:
    """Replaces a tensor by its shape and dtype; anything else stays as it is."""
    if not _is_tensor(value):
        return value
    dtype = keras.backend.standardize_dtype(value.dtype)
    return keras.KerasTensor(tuple(value.shape), dtype=dtype)


@contextlib.contextmanager
def _activated(trace: "_Trace | None") -> Iterator[None]:
    token = _current.set(trace)
    try:
        yield
    finally:
        _current.reset(token)


@contextlib.contextmanager
def _hooks() -> Iterator[None]:
    """Lets the trace of this thread see the calls of layers, products and loops.

    Keras has no public place to listen at. Whoever asks for a product, a layer or an operator of a
    functional model, reaches it through one function of `keras.src.backend`.
    """
    with _lock, contextlib.ExitStack() as restored:
        if not _is_hooked():
            restored.enter_context(_hook(keras.layers.Layer, "__call__", _Trace.layer_call))
            for module, formulas in FORMULAS.items():
                for name, formula in formulas.items():
                    handle = functools.partial(_Trace.product, formula=formula)
                    restored.enter_context(_hook(getattr(backend, module), name, handle))
            for name in _LOOPS:
                handle = functools.partial(_Trace.loop, name=name)
                restored.enter_context(_hook(backend.core, name, handle))
        yield


def _is_hooked() -> bool:
    return hasattr(keras.layers.Layer.__call__, "_is_trace_hook")


@contextlib.contextmanager
def _hook(owner: Any, name: str, handle: Callable[..., Any]) -> Iterator[None]:
    original = getattr(owner, name)

    @functools.wraps(original)
    def hooked(*args: Any, **kwargs: Any) -> Any:
        trace = _current.get()
        if trace is None:
            return original(*args, **kwargs)
        return handle(trace, original, args, kwargs)

    hooked._is_trace_hook = True  # type: ignore[attr-defined]
    setattr(owner, name, hooked)
    try:
        yield
    finally:
        setattr(owner, name, original)
