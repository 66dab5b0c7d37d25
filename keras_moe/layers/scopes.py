"""Calls of layers with other values of their variables, whose effects come out as values."""

from collections.abc import Iterable
from typing import Any

import keras

from keras_moe.core.types import Tensor


class Inside(keras.StatelessScope):
    """Scope in which some variables have other values, and the others those around it.

    Args:
        values: Pairs of a variable and its value, which may be a part of the whole one.
    """

    def __init__(self, values: Iterable[tuple[Any, Tensor]]) -> None:
        super().__init__(collect_losses=True)
        self.state_mapping.update((id(variable), value) for variable, value in values)

    def get_current_value(self, variable: Any) -> Tensor | None:
        value = super().get_current_value(variable)
        if value is None and self.original_scope is not None:
            return self.original_scope.get_current_value(variable)
        return value


def state_of(layer: keras.layers.Layer) -> list[Any]:
    """What a call may change: random states and weights that are state, not those frozen."""
    return [
        variable
        for inner in layer._flatten_layers()
        for variable in (*inner._non_trainable_variables, *random_states(inner))
    ]


def random_states(layer: keras.layers.Layer) -> list[Any]:
    """The states of a layer's own random generators."""
    return [generator.state for generator in layer._seed_generators]
