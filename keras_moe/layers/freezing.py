"""Layers made of parts, each of which can be frozen."""

from typing import Any

import keras

from keras_moe.core.arguments import KeepsArguments
from keras_moe.core.types import Config


class FreezesParts(KeepsArguments):
    """Base of layers whose parts are frozen with them, or alone, before and after saving.

    Keras freezes the sublayers that a layer has when `trainable` is set, and no config says which
    of them was frozen alone. A subclass names its parts, and calls `freeze_parts` once it has them.
    """

    parts: tuple[str, ...] = ()

    def get_config(self) -> Config:
        config: Config = super().get_config()
        layers = {name: getattr(self, name) for name in self.parts}
        frozen = [name for name, part in layers.items() if part is not None and not part.trainable]
        return {**config, "frozen": frozen} if self.trainable and frozen else config

    @classmethod
    def from_config(cls, config: Config) -> Any:
        frozen = config.get("frozen", ())
        layer = super().from_config({key: config[key] for key in config if key != "frozen"})
        for name in frozen:
            getattr(layer, name).trainable = False
        return layer


def freeze_parts(layer: keras.layers.Layer) -> None:
    """Freezes the sublayers that a frozen layer, or one inside of it, got after it was frozen."""
    for part in layer._flatten_layers():
        if not part.trainable:
            # One by one: on TensorFlow, to set what is set already does nothing.
            for inner in part._flatten_layers(include_self=False):
                inner.trainable = False
