"""Layers that a user hands to a layer: how they are stored, and how they are built."""

from typing import Any

import keras

from keras_moe.types import Config


def config_of(sublayer: Any) -> Config:
    """Serializes a sublayer without its `build_config`.

    With it, Keras would build the sublayer on its own when the config is read, under a path of its
    own, before the layer around it does.
    """
    config: Config = keras.saving.serialize_keras_object(sublayer)
    return {key: value for key, value in config.items() if key != "build_config"}


def build_once(sublayer: keras.layers.Layer, input_shape: Any) -> None:
    """Builds a sublayer unless it came built: building twice would make its weights twice."""
    if not sublayer.built:
        sublayer.build(input_shape)
