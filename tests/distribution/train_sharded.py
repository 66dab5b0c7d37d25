"""Trains all mixtures on one device and with experts divided among four; prints JSON.

Run in a process of its own: devices cannot be added to one that has begun.
"""

import json
import os
import sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=4"
    " --xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # run only twice
)

import keras
import numpy as np
from keras import distribution

import keras_moe
from keras_moe import layers


def trained(placement):
    """The losses of two epochs, and of each weight and moment its shape and that on one device."""
    keras.utils.set_random_seed(1)
    distribution.set_distribution(placement)
    inputs = keras.Input((6, 8))
    x = layers.MoE(8, 16, name="moe")(inputs)
    x = layers.MoE(4, 16, experts="glu", num_shared_experts=1, name="gated")(x)
    x = layers.SwitchFFN(8, 16, name="switch")(x)
    x = layers.SoftMoE(4, 16, name="soft")(x)
    x = keras.layers.Add()(layers.MMoE(4, [16, 8], tasks=2, name="mmoe")(x))
    model = keras.Model(inputs, keras.layers.Dense(1, name="head")(x))
    model.compile(keras.optimizers.Adam(0.01), "mse")
    inputs = np.random.default_rng(0).normal(size=(32, 6, 8)).astype("float32")
    targets = inputs.mean(axis=-1, keepdims=True)
    history = model.fit(inputs, targets, batch_size=16, epochs=2, verbose=0, shuffle=False)
    if placement is not None:
        keras_moe.distribution.assert_sharded(model)
    places = {
        weight.path: (weight.shape, weight.value.addressable_shards[0].data.shape)
        for weight in [*model.trainable_variables, *model.optimizer.variables]
    }
    return history.history["loss"], places


alone, _ = trained(None)
divided, places = trained(keras_moe.distribution.expert_parallel())
json.dump({"alone": alone, "divided": divided, "places": places}, sys.stdout)
