"""Layers for models."""

from keras_moe.layers.adatt import AdaTT
from keras_moe.layers.cgc import CGC
from keras_moe.layers.expert_mlp import ExpertMLP
from keras_moe.layers.layer_experts import LayerExperts
from keras_moe.layers.mmoe import MMoE
from keras_moe.layers.moe import MoE
from keras_moe.layers.ple import PLE
from keras_moe.layers.soft_moe import SoftMoE
from keras_moe.layers.switch_ffn import SwitchFFN

__all__ = [
    "CGC",
    "PLE",
    "AdaTT",
    "ExpertMLP",
    "LayerExperts",
    "MMoE",
    "MoE",
    "SoftMoE",
    "SwitchFFN",
]
