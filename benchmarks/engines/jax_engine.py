"""JAX, under `jit`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import keras

from benchmarks.contender import Contender
from benchmarks.engines import Step
from benchmarks.engines.results import outputs_of
from benchmarks.rows import FORWARD


class JaxEngine:
    """Steps are jitted functions of the weights and the inputs."""

    compiles = True

    def step(self, layer: Any, contender: Contender, which: str) -> Step:
        function, arguments = _function(layer, contender, which)
        compiled = jax.jit(function)

        def run() -> None:
            jax.block_until_ready(compiled(*arguments))

        return run

    def memory(self, layer: Any, contender: Contender, which: str) -> int | None:
        function, arguments = _function(layer, contender, which)
        compiled = jax.jit(function).lower(*arguments).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    def forget(self) -> None:
        jax.clear_caches()

    def device(self) -> tuple[str, str | None]:
        device = jax.devices()[0]
        return ("cpu", None) if device.platform == "cpu" else ("gpu", device.device_kind)


def _function(
    layer: Any, contender: Contender, which: str
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """A pure function and its arguments."""
    inputs = keras.ops.convert_to_tensor(contender.inputs, dtype=layer.compute_dtype)
    trainable = [variable.value for variable in layer.trainable_variables]
    fixed = [variable.value for variable in layer.non_trainable_variables]

    def forward(trainable: Any, fixed: Any, inputs: Any) -> Any:
        result, _ = layer.stateless_call(trainable, fixed, inputs, training=False)
        return outputs_of(result)

    def loss(trainable: Any, fixed: Any, inputs: Any) -> Any:
        result, state, losses = layer.stateless_call(
            trainable, fixed, inputs, training=True, return_losses=True
        )
        squares = sum(jnp.mean(jnp.square(output)) for output in outputs_of(result))
        # The new state is returned, as `fit` does, or XLA would leave its computation out.
        return squares.astype("float32") + sum(losses), state

    function = forward if which == FORWARD else jax.grad(loss, (0, 2), has_aux=True)
    return function, (trainable, fixed, inputs)


def make(compiled: bool) -> JaxEngine:
    """The engine; there is one way to compile."""
    del compiled
    return JaxEngine()
