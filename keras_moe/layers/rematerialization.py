"""Recomputing experts in the backward pass, and nothing else."""

from collections.abc import Callable
from typing import Any

import keras


class RematerializesExperts(keras.layers.Layer):
    """Base of layers that under `keras.RematScope` recompute their experts only.

    Keras would recompute a whole `call`: jitter would be drawn anew and tokens routed elsewhere
    than in the forward pass, and counts would be added twice. A router is cheap and its record is
    small, so what it decided is kept. Experts with dropout are not recomputed: a random state that
    is drawn inside of a recomputed function is lost on JAX.
    """

    _recomputes_experts = False
    recorder: Callable[[Any], None] | None = None  # gets every record: `keras_moe.record_routing`
    counts_always = False  # in inference too
    dropout: float = 0.0

    def rematerialized_call(
        self, layer_call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Callable[..., Any]:
        """Keras's hook: decides whether to recompute, and leaves how to the layer."""
        wanted = super().rematerialized_call(layer_call, *args, **kwargs)
        self._recomputes_experts = wanted is not layer_call and not self.dropout
        for layer in self._flatten_layers(include_self=False):
            layer._remat_mode = None  # it is this layer's to decide
        return layer_call
