"""Trains a model with each family of layers, saves it and loads it."""

import keras
import numpy as np

import keras_moe
from keras_moe import callbacks, layers

inputs = keras.Input((4, 6))
x = layers.MoE(4, 8)(inputs)
x = layers.SoftMoE(2, 8)(x)
(y,) = layers.MMoE(3, [5], 1)(keras.ops.mean(x, axis=1))
model = keras.Model(inputs, keras.layers.Dense(1)(y))
model.compile("adam", "mse")
data = np.random.default_rng(0).normal(size=(16, 4, 6)).astype("float32")
model.fit(data, data[:, 0, :1], verbose=0, callbacks=[callbacks.ExpertMonitor(alarms=False)])
model.save("model.keras")
again = keras.saving.load_model("model.keras")
np.testing.assert_allclose(
    again.predict(data, verbose=0), model.predict(data, verbose=0), rtol=1e-5
)
assert "site-packages" in keras_moe.__file__, keras_moe.__file__
