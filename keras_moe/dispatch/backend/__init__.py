"""Operations that a backend does better than portable Keras code: no other place imports one.

`current` is the module of the backend in use, chosen once. Each module has all that `portable` has,
in Keras's own operations or in those of its backend.
"""

from types import ModuleType

import keras


def _chosen() -> ModuleType:
    name = keras.backend.backend()
    if name == "jax":
        from keras_moe.dispatch.backend import jax

        return jax
    if name == "tensorflow":
        from keras_moe.dispatch.backend import tensorflow

        return tensorflow
    if name == "torch":
        from keras_moe.dispatch.backend import torch

        return torch
    from keras_moe.dispatch.backend import portable

    return portable


current = _chosen()
