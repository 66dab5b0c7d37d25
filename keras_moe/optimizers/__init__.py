"""Optimizers that know which weights are banks of experts, routers and gates."""

from keras_moe.optimizers.muon import Muon

__all__ = ["Muon"]
