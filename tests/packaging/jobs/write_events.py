"""Writes what the experts do for TensorBoard, and reads it as TensorBoard does."""

import keras
import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from keras_moe import callbacks, layers

model = keras.Sequential([keras.Input((6,)), layers.MoE(4, 8, name="moe"), keras.layers.Dense(1)])
model.compile("adam", "mse")
data = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
monitor = callbacks.ExpertMonitor(log_dir="logs", alarms=False)
history = model.fit(data, data[:, :1], epochs=2, verbose=0, callbacks=[monitor]).history
events = EventAccumulator("logs").Reload().Scalars("moe/load_cv")
np.testing.assert_allclose([event.value for event in events], history["moe/load_cv"], rtol=1e-6)
