"""Recomputing experts in the backward pass, and nothing else."""

from collections.abc import Callable, Iterable
from typing import Any

import keras
from keras import ops
from keras.src.backend import AutocastScope

from keras_moe.core.types import Tensor
from keras_moe.layers.scopes import Inside, state_of


class RematerializesExperts(keras.layers.Layer):
    """Base of layers that under `keras.RematScope` recompute their experts only.

    Keras would recompute a whole `call`: jitter would be drawn anew and tokens routed elsewhere
    than in the forward pass, and counts would be added twice. A router is cheap and its record is
    small, so what it decided is kept.
    """

    experts: Any
    _recomputes_experts = False
    recorder: Callable[[Any], None] | None = None  # gets every record: `keras_moe.record_routing`
    counts_in_training = True  # a switch, to be set before `fit` compiles
    counts_always = False  # in inference too

    def _is_counted(self, training: bool | None) -> bool:
        """Whether a call is counted."""
        return bool(training and self.counts_in_training) or self.counts_always

    def rematerialized_call(
        self, layer_call: Callable[..., Any], *args: Any, **kwargs: Any
    ) -> Callable[..., Any]:
        """Keras's hook: decides whether to recompute, and leaves how to the layer."""
        wanted = super().rematerialized_call(layer_call, *args, **kwargs)
        self._recomputes_experts = wanted is not layer_call
        keep_from_remat(self._layers)  # it is this layer's to decide
        return layer_call

    def _call_experts(self, run: Callable[..., Tensor], *args: Tensor) -> Tensor:
        """Calls a function of tensors that runs the experts; recomputed, where that is wanted.

        What experts draw, update and add as losses leaves a recomputed function as values, and
        it begins with the same state both times: it draws the same numbers.
        """
        if not self._recomputes_experts:
            return run(*args)
        with AutocastScope(None):
            before = [(variable, ops.copy(variable.value)) for variable in state_of(self.experts)]
        updated: list[Any] = []

        def run_without_effects(*args: Tensor) -> tuple[Tensor, list[Tensor], list[Tensor]]:
            with Inside(before) as scope:
                start = [(variable, scope.get_current_value(variable)) for variable, _ in before]
                outputs, losses = run(*args), list(scope.losses)
                self.experts._clear_losses()  # which are added outside
                after = [(v, scope.get_current_value(v), old) for v, old in start]
            changed = [(variable, new) for variable, new, old in after if new is not old]
            updated[:] = [variable for variable, _ in changed]
            return outputs, [value for _, value in changed], losses

        outputs, values, losses = keras.remat(run_without_effects)(*args)
        for variable, value in zip(updated, values, strict=True):
            variable.assign(value)
        for loss in losses:
            self.add_loss(loss)
        return outputs


def keep_from_remat(layers: Iterable[keras.layers.Layer]) -> None:
    """Takes from layers, and those in them, what `keras.RematScope` told them to do."""
    for layer in layers:
        for inner in layer._flatten_layers():
            inner._remat_mode = None
            functional = getattr(inner, "_functional", None)  # which a `Sequential` runs, unlisted
            if functional is not None:
                functional._remat_mode = None
