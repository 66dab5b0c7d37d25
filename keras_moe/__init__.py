"""Mixture-of-Experts for Keras 3, on TensorFlow, JAX and PyTorch."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

# All that registers a Keras class is imported here: saved models load after `import keras_moe`.
from keras_moe import callbacks, dispatch, layers, models, multitask, optimizers, routers
from keras_moe.core.exporting import exporting
from keras_moe.core.records import GateRouting, Routing, SoftRouting
from keras_moe.inspection.recording import record_routing
from keras_moe.version import __version__

if TYPE_CHECKING:
    from keras_moe.reporting.report import report

__all__ = [
    "GateRouting",
    "Routing",
    "SoftRouting",
    "__version__",
    "callbacks",
    "dispatch",
    "distribution",
    "exporting",
    "flops",
    "layers",
    "models",
    "multitask",
    "optimizers",
    "plots",
    "record_routing",
    "report",
    "routers",
    "tuning",
]


def __getattr__(name: str) -> Any:
    if name == "report":
        return import_module("keras_moe.reporting").report
    if name in ("distribution", "flops", "plots", "tuning"):  # what only some programs need
        return import_module(f"keras_moe.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
