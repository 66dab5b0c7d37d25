"""Random states that are saved with the model, so that training resumes exactly."""

from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe.core.loading import NamesSizes

_KEY = "seed_generator_state"


class SavesSeed(NamesSizes):
    """Base of layers that draw from their own `seed_generator`, or None.

    Keras saves weights and no random states: a loaded model would draw its first numbers again. A
    file without the state, of another version or of a layer without noise, loads too.
    """

    seed_generator: keras.random.SeedGenerator | None = None

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        if self.seed_generator is not None:
            # int64 holds what each backend has: uint32, int64 and int32.
            state = ops.convert_to_numpy(self.seed_generator.state)
            store[_KEY] = np.asarray(state, dtype="int64")

    def load_own_variables(self, store: Any) -> None:
        super().load_own_variables({key: store[key] for key in store.keys() if key != _KEY})  # noqa: SIM118
        if self.seed_generator is not None and _KEY in store.keys():  # noqa: SIM118
            state = self.seed_generator.state
            state.assign(np.asarray(store[_KEY]).astype(state.dtype))
