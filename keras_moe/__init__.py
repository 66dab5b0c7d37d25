"""Mixture-of-Experts for Keras 3, on TensorFlow, JAX and PyTorch."""

from keras_moe import callbacks, dispatch, layers, routers
from keras_moe.routing import GateRouting, Routing, SoftRouting
from keras_moe.version import __version__

__all__ = [
    "GateRouting",
    "Routing",
    "SoftRouting",
    "__version__",
    "callbacks",
    "dispatch",
    "layers",
    "routers",
]
