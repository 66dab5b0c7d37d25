"""Every gradient of a weight is a dense tensor that optimizers may square."""

import keras
import numpy as np
import pytest

from keras_moe import layers

BANKS = {
    "walk": lambda: layers.MoE(4, 8),
    "glu": lambda: layers.MoE(4, 8, experts="glu", num_shared_experts=1),
    "capacity": lambda: layers.MoE(4, 8, capacity_factor=1.0),
    "soft": lambda: layers.SoftMoE(4, 8),
    "mmoe": lambda: layers.MMoE(4, [8, 6], ["a"]),
    "layers": lambda: layers.MoE(3, experts=keras.layers.Dense(6)),
}


@pytest.mark.parametrize("make", BANKS.values(), ids=BANKS.keys())
def test_first_adam_step_is_no_longer_than_the_learning_rate(make):
    """Adam's first step is lr * sign(g) for any dense g, and longer if pieces of g are squared."""
    layer, rate = make(), 1e-2
    inputs = keras.Input((6,))
    model = keras.Model(inputs, keras.tree.flatten(layer(inputs)))
    model.compile(keras.optimizers.Adam(rate, epsilon=1e-12), "mse")
    before = [keras.ops.convert_to_numpy(v.value).copy() for v in layer.trainable_variables]
    x = np.random.default_rng(0).normal(size=(32, 6)).astype("float32")
    model.fit(x, x, batch_size=32, verbose=0)
    for variable, old in zip(layer.trainable_variables, before, strict=True):
        step = np.abs(keras.ops.convert_to_numpy(variable.value) - old).max()
        assert 0.9 * rate < step < 1.01 * rate, (variable.path, step / rate)
