"""A small model with a mixture of each kind that follows the load, and its data."""

import keras
import numpy as np

from keras_moe import layers, routers

EXPERTS, WIDTH, BATCH, STEPS = 4, 8, 32, 12


def make_model():
    keras.utils.set_random_seed(3)
    inputs = keras.Input((WIDTH,))
    x = layers.MoE(
        EXPERTS, 16, router=routers.TopKRouter(EXPERTS, 2, global_balance=True), name="top_k"
    )(inputs)
    x = layers.MoE(
        EXPERTS,
        16,
        router=routers.SigmoidBiasRouter(EXPERTS, 1, bias_update_rate=0.01),
        name="bias",
    )(x)
    x = layers.MoE(EXPERTS, 16, router="relu", top_k=2, name="relu")(x)
    x = keras.layers.Add()(layers.MMoE(3, [16, WIDTH], tasks=2, name="mmoe")(x))
    x = keras.layers.Reshape((2, WIDTH // 2))(x)
    x = layers.SoftMoE(2, 16, name="soft")(x)
    return keras.Model(inputs, keras.layers.Dense(1, name="head")(keras.layers.Flatten()(x)))


def data():
    rng = np.random.default_rng(0)
    inputs = rng.normal(size=(BATCH * STEPS, WIDTH)).astype("float32")
    return inputs, inputs[:, :1] * inputs[:, 1:2]


def seen(model):
    """What a trained model has: its weights, and what its layers counted."""
    return {
        "weights": {
            variable.path: np.asarray(keras.ops.convert_to_numpy(variable)).tolist()
            for variable in model.weights
        },
        "counts": {
            layer.name: {name: np.asarray(c).tolist() for name, c in layer.running_counts().items()}
            for layer in model.layers
            if hasattr(layer, "running_counts")
        },
    }
