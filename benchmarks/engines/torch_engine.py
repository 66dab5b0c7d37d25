"""PyTorch, eager or with `torch.compile`."""

from __future__ import annotations

from typing import Any

import keras
import torch

from benchmarks.contender import Contender
from benchmarks.engines import Step
from benchmarks.engines.results import outputs_of
from benchmarks.measure.memory import weight_bytes
from benchmarks.rows import FORWARD


class TorchEngine:
    """Steps call the layer; Keras layers and plain torch modules are called alike."""

    def __init__(self, compiles: bool) -> None:
        self.compiles = compiles

    def step(self, layer: Any, contender: Contender, which: str) -> Step:
        is_keras = isinstance(layer, keras.Layer)
        policy = layer if is_keras else keras.config.dtype_policy()
        inputs = keras.ops.convert_to_tensor(contender.inputs, dtype=policy.compute_dtype)
        weights = [weight for weight in layer.parameters() if weight.requires_grad]
        if not is_keras:
            layer.train(which != FORWARD)

        def forward(inputs: Any) -> list[Any]:
            return outputs_of(layer(inputs, training=False) if is_keras else layer(inputs))

        def loss(inputs: Any) -> Any:
            result = layer(inputs, training=True) if is_keras else layer(inputs)
            losses = layer.losses if is_keras else contender.losses_of(result)
            squares = sum(output.square().mean() for output in outputs_of(result))
            return squares.float() + sum(losses)

        function = forward if which == FORWARD else loss
        if self.compiles:
            function = torch.compile(function)

        def run_forward() -> None:
            with torch.no_grad():
                function(inputs)
            _wait()

        def run_gradient() -> None:
            leaf = inputs.detach().requires_grad_()
            # Some weights may take no part: a buffer that a library made a parameter.
            torch.autograd.grad(function(leaf), [leaf, *weights], allow_unused=True)
            _wait()

        return run_forward if which == FORWARD else run_gradient

    def memory(self, layer: Any, contender: Contender, which: str) -> int | None:
        """Reads the allocator's count on a GPU; None on a CPU."""
        if not torch.cuda.is_available():
            return None
        step = self.step(layer, contender, which)
        step()
        step()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before - weight_bytes(layer)

    def forget(self) -> None:
        torch.compiler.reset()

    def device(self) -> tuple[str, str | None]:
        if not torch.cuda.is_available():
            return "cpu", None
        return "gpu", torch.cuda.get_device_name()


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make(compiled: bool) -> TorchEngine:
    """The engine, with `torch.compile` where `compiled`."""
    return TorchEngine(compiles=compiled)
