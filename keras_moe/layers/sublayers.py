"""Layers that a user hands to a layer: how they are stored, and how they are built."""

from typing import Any

import keras

from keras_moe.core import checks
from keras_moe.core.types import Config, Shape


def config_of(sublayer: Any) -> Config:
    """Serializes a sublayer without its `build_config`.

    With it, Keras would build the sublayer on its own when the config is read, under a path of its
    own, before the layer around it does.
    """
    config: Config = keras.saving.serialize_keras_object(sublayer)
    return {key: value for key, value in config.items() if key != "build_config"}


def adopt(sublayer: keras.layers.Layer, name: str | None = None) -> None:
    """Takes a sublayer that a user made as this layer's own, under a name checkpoints rely on.

    A sublayer of two layers would be saved with one and missing from the other: Keras could not
    load such a model, so it is refused before it is trained.
    """
    check_free(sublayer)
    sublayer._is_adopted = True
    if name is not None and not sublayer.built:
        sublayer.name = name


def check_free(*sublayers: keras.layers.Layer) -> None:
    """Fails where a sublayer is another layer's: before any of several is taken."""
    for sublayer in sublayers:
        if getattr(sublayer, "_is_adopted", False):
            checks.fail("A router, gate or expert must belong to one layer only.", layer=sublayer)


def build_once(sublayer: keras.layers.Layer, input_shape: Shape) -> None:
    """Builds a sublayer unless it came built: building twice would make its weights twice."""
    if not sublayer.built:
        sublayer.build(input_shape)


def build_by_call(sublayer: Any, input_shape: Shape) -> None:
    """Builds any layer with all layers in it, also one that has `call` and no `build`."""
    if not all(layer.built for layer in sublayer._flatten_layers()):
        sublayer(keras.KerasTensor(input_shape, dtype=sublayer.compute_dtype))


def name_or_default(name: str | None, default: str) -> str:
    """Returns `name`, or a name free in this session: "moe", "moe_1", where Keras says "mo_e"."""
    if name is not None:
        return name
    count: int = keras.backend.get_uid(default)
    return default if count == 1 else f"{default}_{count - 1}"
