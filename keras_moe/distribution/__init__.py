"""Experts and batches divided among devices, on JAX under `keras.distribution`."""

from keras_moe.distribution.expert_parallel import ExpertParallel, expert_parallel
from keras_moe.distribution.sharding import assert_sharded

__all__ = ["ExpertParallel", "assert_sharded", "expert_parallel"]
