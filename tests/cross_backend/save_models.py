"""Trains a model per layer for two steps and saves it: run in a process per backend."""

import sys
from pathlib import Path

import keras
import numpy as np

from keras_moe import layers

WIDTH = 6


def mixtures():
    """Every layer, with its branches."""
    return {
        "moe": layers.MoE(5, 8),
        "moe_glu": layers.MoE(5, 8, experts="glu", activation="silu", num_shared_experts=1),
        "moe_dense": layers.MoE(4, 8, router="dense"),
        "moe_capacity": layers.MoE(4, 8, capacity_factor=1.0, capacity_group="example"),
        "moe_example": layers.MoE(4, 8, routing_level="example"),
        "moe_template": layers.MoE(3, experts=keras.layers.Dense(WIDTH, activation="tanh")),
        "switch": layers.SwitchFFN(4, 8),
        "soft": layers.SoftMoE(4, 8, slots_per_expert=2),
        "soft_glu": layers.SoftMoE(4, 8, experts="glu"),
        "mmoe": layers.MMoE(4, [8, WIDTH], tasks=["a", "b"], gate_dropout=0.1),
    }


def model_of(layer):
    inputs = keras.Input((None,), dtype="int32")
    embedded = keras.layers.Embedding(20, WIDTH, mask_zero=True)(inputs)
    mixed = keras.tree.flatten(layer(embedded))
    outputs = keras.layers.Add()(mixed) if len(mixed) > 1 else mixed[0]
    pooled = keras.layers.GlobalAveragePooling1D()(outputs)
    return keras.Model(inputs, keras.layers.Dense(3)(pooled))


def data():
    rng = np.random.default_rng(0)
    ids = rng.integers(1, 20, size=(12, 7)).astype("int32")
    ids[:, 5:] = 0
    return ids, rng.normal(size=(12, 3)).astype("float32")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name, layer in mixtures().items():
        model = model_of(layer)
        model.compile(keras.optimizers.SGD(0.5), "mse")
        model.fit(*data(), batch_size=6, verbose=0)
        model.save(folder / f"{keras.backend.backend()}-{name}.keras")
