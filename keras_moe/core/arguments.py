"""Layers whose constructor arguments can be read but not changed."""

import functools
import inspect
from typing import Any

import keras

_OF_THIS_LIBRARY = __name__.partition(".")[0]


class KeepsArguments(keras.layers.Layer):
    """Base of layers that refuse to change what they were made with.

    Weights, banks and programs are made from the arguments: an attribute that is set later would
    change nothing, or half of the layer. What may change is a property with a setter.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        kind: Any = type(self)
        if name in _fixed_names(kind):
            made = self.__dict__.get("_made_with", frozenset())
            if name in made:
                raise AttributeError(
                    f"`{name}` of `{type(self).__name__}` is fixed when the layer is made: make "
                    f"another layer. Received: {name}={value!r}"
                )
            if value is not None or name not in getattr(self, "parts", ()):
                object.__setattr__(self, "_made_with", made | {name})
        super().__setattr__(name, value)


@functools.cache
def _fixed_names(layer: type) -> frozenset[str]:
    """The constructor's arguments that are plain attributes, and the parts of a layer."""
    names = set(getattr(layer, "parts", ()))
    for base in layer.__mro__:
        if base.__module__.partition(".")[0] == _OF_THIS_LIBRARY and "__init__" in vars(base):
            names.update(inspect.signature(vars(base)["__init__"]).parameters)
    names -= set(inspect.signature(keras.layers.Layer.__init__).parameters)
    return frozenset(name for name in names if not isinstance(getattr(layer, name, None), property))
