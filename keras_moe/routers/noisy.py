"""Base of routers that choose under noise and balance by importance and load."""

import keras
from keras import ops

from keras_moe.core.types import Tensor
from keras_moe.routers.base import LinearRouter


class NoisyRouter(LinearRouter):
    """Base of routers with normal noise on the logits, an importance and a load loss."""

    draws_noise = True

    def _noisy(self, logits: Tensor, std: Tensor | float) -> Tensor:
        noise = keras.random.normal(ops.shape(logits), dtype="float32", seed=self.seed_generator)
        return logits + noise * std
