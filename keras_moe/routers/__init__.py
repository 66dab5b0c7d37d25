"""Routers: the rules that send tokens to experts, and the gates of tasks."""

from keras_moe.routers.base import Decision, LinearRouter, Router, Served
from keras_moe.routers.batch_priority import BatchPriorityRouter
from keras_moe.routers.dense import DenseRouter
from keras_moe.routers.dselect_k import DSelectKRouter
from keras_moe.routers.expert_choice import ExpertChoiceRouter
from keras_moe.routers.fixed import HashRouter, RandomRouter, UniformRouter
from keras_moe.routers.gates import Gate, LinearGate
from keras_moe.routers.no_token_left import NoTokenLeftRouter
from keras_moe.routers.noisy_top_k import NoisyTopKRouter
from keras_moe.routers.registry import get
from keras_moe.routers.relu import ReLURouter
from keras_moe.routers.router_gate import RouterGate
from keras_moe.routers.sigmoid_bias import SigmoidBiasRouter
from keras_moe.routers.sigmoid_gate import SigmoidGate
from keras_moe.routers.sinkhorn import SinkhornRouter
from keras_moe.routers.soft import SoftRouter
from keras_moe.routers.softmax_gate import SoftmaxGate
from keras_moe.routers.switch import SwitchRouter
from keras_moe.routers.token_hash import TokenHashRouter
from keras_moe.routers.top_k import TopKRouter

__all__ = [
    "BatchPriorityRouter",
    "DSelectKRouter",
    "Decision",
    "DenseRouter",
    "ExpertChoiceRouter",
    "Gate",
    "HashRouter",
    "LinearGate",
    "LinearRouter",
    "NoTokenLeftRouter",
    "NoisyTopKRouter",
    "RandomRouter",
    "ReLURouter",
    "Router",
    "RouterGate",
    "Served",
    "SigmoidBiasRouter",
    "SigmoidGate",
    "SinkhornRouter",
    "SoftRouter",
    "SoftmaxGate",
    "SwitchRouter",
    "TokenHashRouter",
    "TopKRouter",
    "UniformRouter",
    "get",
]
