"""Counters that a layer carries along as a non-trainable weight."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe import _checks
from keras_moe.types import Tensor

_BASE = 2.0**20


def check_built(layer: keras.layers.Layer) -> None:
    """Fails with what to do where a layer has not begun to count."""
    if not layer.built:
        _checks.fail(
            f"`{type(layer).__name__}` has counts once it is built: call the layer, or build it.",
            built=False,
        )


class RunningSums:
    """Sums that stay exact over a long training, in two float32 limbs.

    A single float32 stops counting at 2^24 and integers of 64 bits do not exist on JAX by default;
    here the low limb overflows into the high one, which is good to 2^44. On several replicas, the
    first one's counts are kept.

    Args:
        owner: The layer that gets the weight, of shape `(2, *shape)`.
        name: Name of the weight.
        shape: Shape of the sums.
    """

    def __init__(self, owner: keras.layers.Layer, name: str, shape: tuple[int, ...] = ()) -> None:
        self._limbs = owner.add_weight(
            name=name,
            shape=(2, *shape),
            initializer="zeros",
            dtype="float32",
            trainable=False,
            autocast=False,
            aggregation="only_first_replica",
        )

    def add(self, values: Tensor) -> None:
        """Adds; what is not finite counts as 0, so that one bad batch does not end the counting."""
        values = ops.stop_gradient(ops.cast(values, "float32"))
        values = ops.where(ops.isfinite(values), values, ops.zeros_like(values))
        low = self._limbs[1] + values
        carry = ops.floor(low / _BASE)
        self._limbs.assign(ops.stack([self._limbs[0] + carry, low - carry * _BASE]))

    def read(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The sums since the last reset, float64."""
        high, low = np.asarray(ops.convert_to_numpy(self._limbs.value), dtype=np.float64)
        total: np.ndarray[Any, np.dtype[np.float64]] = np.asarray(high * _BASE + low)
        return total

    def reset(self) -> None:
        """Starts again from 0."""
        self._limbs.assign(ops.zeros_like(self._limbs.value))
