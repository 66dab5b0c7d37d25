"""Backends that run a layer as their users compile it, and wait for the results."""

from __future__ import annotations

import importlib
from typing import Any, Protocol

from benchmarks.contender import Contender

BACKENDS = ("jax", "tensorflow", "tensorflow-xla", "torch", "torch-compile")


class Step(Protocol):
    """One forward pass, or one gradient; it returns when all results are there."""

    def __call__(self) -> None: ...


class Engine(Protocol):
    """A backend with a way to compile.

    Attributes:
        compiles: whether a first call compiles anything.
    """

    compiles: bool

    def step(self, layer: Any, contender: Contender, which: str) -> Step:
        """A new function of the layer, compiled at its first call.

        Args:
            layer: what `contender.make` made.
            contender: its inputs, and where its losses are.
            which: "forward" is inference. "gradient" is the gradient of the mean square of the
                outputs plus all losses in training, by the inputs and all trainable weights.
        """
        ...

    def memory(self, layer: Any, contender: Contender, which: str) -> int | None:
        """Bytes that a step needs beyond weights, inputs and gradients; None if unknown."""
        ...

    def forget(self) -> None:
        """Drops what was compiled, so that it is compiled anew."""
        ...

    def device(self) -> tuple[str, str | None]:
        """ "cpu" or "gpu", and the accelerator's name."""
        ...


def get(backend: str) -> Engine:
    """The engine for one of `BACKENDS`, in a process whose Keras backend it is."""
    name, _, variant = backend.partition("-")
    module = importlib.import_module(f"benchmarks.engines.{name}_engine")
    return module.make(compiled=bool(variant))
