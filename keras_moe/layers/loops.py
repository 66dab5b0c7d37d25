"""Loops that compile the call of a layer once for all of their steps."""

import keras
from keras.src.backend.common import global_state

from keras_moe.core import checks


def enclosing_loop() -> keras.layers.Layer | None:
    """The recurrent layer in whose loop the call is, None where there is none.

    A step of such a loop can change no state: JAX and TensorFlow trace it once, and PyTorch runs
    the first step twice.
    """
    for scope in global_state.get_global_attribute("name_scope_stack", []):
        caller = scope.caller
        if isinstance(caller, keras.layers.RNN) and not caller.unroll:
            return caller
    return None


def check_outside_of_loops() -> None:
    """Fails where the state of a layer would change in the loop of a recurrent layer."""
    loop = enclosing_loop()
    if loop is not None:
        checks.fail(
            "A mixture in the cell of a recurrent layer can be trained with `unroll=True` only: it "
            f"counts, and the steps of a loop cannot: `{type(loop).__name__}(..., unroll=True)`.",
            layer=loop.name,
            unroll=False,
        )
