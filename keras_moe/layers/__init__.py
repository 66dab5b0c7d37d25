"""Layers for models."""

from keras_moe.layers.expert_mlp import ExpertMLP
from keras_moe.layers.layer_experts import LayerExperts
from keras_moe.layers.mmoe import MMoE
from keras_moe.layers.moe import MoE
from keras_moe.layers.soft_moe import SoftMoE
from keras_moe.layers.switch_ffn import SwitchFFN

__all__ = ["ExpertMLP", "LayerExperts", "MMoE", "MoE", "SoftMoE", "SwitchFFN"]
