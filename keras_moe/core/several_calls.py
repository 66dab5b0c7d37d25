"""The losses of layers that are called several times in one step."""

import weakref
from typing import Any

import keras
from keras.src.backend import get_stateless_scope, in_stateless_scope


class KeepsLosses(keras.layers.Layer):
    """Base of layers that add the losses of each of their calls in a step."""

    _losses_scope: Any = None

    def _clear_losses(self) -> None:
        # On JAX, Keras (3.15.1) runs a model's layers without a call context of the model: each
        # call of a layer counts as a new step and would drop the losses of the call before.
        scope = get_stateless_scope() if in_stateless_scope() else None
        if scope is not None and scope.collect_losses:
            if self._losses_scope is not None and self._losses_scope() is scope:
                return
            self._losses_scope = weakref.ref(scope)
        super()._clear_losses()
