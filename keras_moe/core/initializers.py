"""Initialisation of stacked expert weights.

Keras counts the leading expert axis of an `(E, in, out)` kernel as a receptive field, which makes
`glorot_uniform` too small by sqrt(E), and one initializer instance gives the same numbers at every
call, which makes all experts start equal. Both ruin a mixture silently.
"""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe.core import checks
from keras_moe.core.types import Config, InitializerLike, Tensor


class FiniteInitializer(keras.initializers.Initializer):
    """Calls another initializer and fails if it yields NaN or Inf, before training does.

    Args:
        initializer: The initializer to call.
        weight: Name of the weight, for the message.
    """

    def __init__(self, initializer: InitializerLike, weight: str) -> None:
        self.initializer = keras.initializers.get(initializer)
        self.weight = weight

    def __call__(self, shape: Sequence[int], dtype: str | None = None) -> Tensor:
        value = self.initializer(shape, dtype=dtype)
        try:
            array = ops.convert_to_numpy(ops.cast(value, "float32"))
        except (NotImplementedError, TypeError):
            return value  # symbolic: shape inference, the variable itself is made eagerly later
        if not np.isfinite(array).all():
            checks.fail(
                f"The initializer of `{self.weight}` must return finite numbers.",
                initializer=self.initializer,
                non_finite_values=int((~np.isfinite(array)).sum()),
            )
        return value

    def get_config(self) -> Config:
        return {
            "initializer": keras.initializers.serialize(self.initializer),
            "weight": self.weight,
        }


class PerExpertInitializer(keras.initializers.Initializer):
    """Draws each expert's slice of an `(E, ...)` weight on its own, with its own fans and seed.

    Args:
        initializer: Initializer of one expert's weight, of shape `(...)`. With an integer seed the
            draws are reproducible, and differ by expert and by `weight`.
        weight: Name of the weight, unique in its layer.
    """

    def __init__(self, initializer: InitializerLike, weight: str) -> None:
        self.initializer = keras.initializers.get(initializer)
        self.weight = weight

    def __call__(self, shape: Sequence[int], dtype: str | None = None) -> Tensor:
        num_experts, *expert_shape = shape
        return ops.stack(
            [
                self._of_expert(expert)(tuple(expert_shape), dtype=dtype)
                for expert in range(num_experts)
            ]
        )

    def _of_expert(self, expert: int) -> FiniteInitializer:
        purpose = self.weight.rsplit("/")[-1]
        return FiniteInitializer(reseeded(self.initializer, purpose, expert), self.weight)

    def get_config(self) -> Config:
        return {
            "initializer": keras.initializers.serialize(self.initializer),
            "weight": self.weight,
        }


def reseeded(initializer: InitializerLike, purpose: str, index: int = 0) -> InitializerLike:
    """Returns a copy with a seed for `purpose`, or the initializer itself if it takes no seed."""
    if not isinstance(initializer, keras.initializers.Initializer):
        return initializer
    config = initializer.get_config()
    if not _has_seed(config):
        return initializer
    return type(initializer).from_config(reseeded_config(config, purpose, index))


def _has_seed(config: Any) -> bool:
    if isinstance(config, dict):
        return "seed" in config or any(_has_seed(value) for value in config.values())
    return isinstance(config, list | tuple) and any(_has_seed(value) for value in config)


def reseeded_config(config: Any, purpose: str, index: int = 0) -> Any:
    """Copies a Keras config with every integer seed replaced by one derived for `purpose`."""
    if isinstance(config, dict):
        return {
            key: derived_seed(value, purpose, index)
            if key == "seed" and isinstance(value, int)
            else reseeded_config(value, purpose, index)
            for key, value in config.items()
        }
    if isinstance(config, list | tuple):
        return type(config)(reseeded_config(value, purpose, index) for value in config)
    return config


def derived_seed(seed: int | None, purpose: str, index: int = 0) -> int | None:
    """Derives a seed for a purpose and an index. None, for a random seed, stays None."""
    if seed is None:
        return None
    entropy = [seed % 2**32, *purpose.encode(), index]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)  # fits in int32
