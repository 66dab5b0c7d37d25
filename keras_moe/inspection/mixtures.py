"""Search for the mixture layers of a model, and their names."""

from collections import Counter
from typing import Any, TypeVar

import keras

from keras_moe.core import checks

T = TypeVar("T")


def mixture_layers(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Returns the built layers of a model that count, nested ones too, in the model's order.

    The model may be one of Keras 2: then they are those inside of bridges.
    """
    layers: dict[int, keras.layers.Layer] = {}
    _collect(watched("model", model), layers)
    return [
        layer
        for layer in layers.values()
        if callable(getattr(layer, "running_counts", None)) and layer.built
    ]


def watched(name: str, model: Any) -> Any:
    """Returns `model` if it is a layer or model of Keras 3, or of Keras 2, which may hold some."""
    is_model = hasattr(model, "_flatten_layers") and not isinstance(model, type)
    return model if is_model else checks.keras_layer(name, model)


def is_of_keras_3(model: Any) -> bool:
    """Whether a model that is watched is none of Keras 2."""
    return isinstance(model, keras.layers.Layer)


def _collect(layer: Any, layers: dict[int, Any]) -> None:
    """Adds a layer and what it holds, once each; Keras's own list has nested layers backwards."""
    if id(layer) in layers:
        return
    layers[id(layer)] = layer
    for sublayer in layer._flatten_layers(include_self=False, recursive=False):
        _collect(sublayer, layers)
    if not is_of_keras_3(layer) and is_of_keras_3(getattr(layer, "layer", None)):  # a bridge
        _collect(layer.layer, layers)


def unique_names(layers: list[keras.layers.Layer]) -> list[tuple[str, keras.layers.Layer]]:
    """Names the layers by their own name: "moe", then "moe#2" for a second "moe"."""
    seen: Counter[str] = Counter()
    named = []
    for layer in layers:
        seen[layer.name] += 1
        count = seen[layer.name]
        named.append((layer.name if count == 1 else f"{layer.name}#{count}", layer))
    return named


def named_layers(model: keras.layers.Layer) -> list[tuple[str, keras.layers.Layer]]:
    """The mixture layers of a model by name."""
    return unique_names(mixture_layers(model))


def sync_state(model: keras.layers.Layer) -> None:
    """Lets the model's variables hold its state, which JAX's `fit` keeps elsewhere meanwhile."""
    getattr(model, "jax_state_sync", lambda: None)()


def one_layer(
    model: keras.layers.Layer, by_layer: dict[str, T], layer: str | None, kind: str
) -> tuple[str, T]:
    """The named layer's entry, or the only one.

    Args:
        model: the model, for the message.
        by_layer: what there is to choose from, by layer name.
        layer: a name, or None.
        kind: what the layers must be, with its article.

    Raises:
        ValueError: where there is none, or several and no name.
    """
    if layer is None and len(by_layer) == 1:
        return next(iter(by_layer.items()))
    if not by_layer:
        checks.fail(
            f"`model` must have {kind}, and must have been called once.",
            model=model.name,
            mixtures=[name for name, _ in named_layers(model)],
        )
    if layer not in by_layer:
        checks.fail(f"`layer` must name {kind}: one of {sorted(by_layer)}.", layer=layer)
    return str(layer), by_layer[str(layer)]
