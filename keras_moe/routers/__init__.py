"""Who decides: the rules that send tokens to experts, and the gates of tasks."""

from keras_moe.routers.base import Router
from keras_moe.routers.dense import DenseRouter
from keras_moe.routers.registry import get
from keras_moe.routers.soft import SoftRouter
from keras_moe.routers.softmax_gate import SoftmaxGate
from keras_moe.routers.switch import SwitchRouter
from keras_moe.routers.top_k import TopKRouter

__all__ = [
    "DenseRouter",
    "Router",
    "SoftRouter",
    "SoftmaxGate",
    "SwitchRouter",
    "TopKRouter",
    "get",
]
