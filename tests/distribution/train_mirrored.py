"""Trains on one CPU and on two replicas under `tf.distribute.MirroredStrategy`; prints JSON."""

import contextlib
import json
import os
import sys

os.environ["KERAS_BACKEND"] = "tensorflow"

import keras
import tensorflow as tf
from replicated import BATCH, data, make_model, seen

cpu = tf.config.list_physical_devices("CPU")[0]
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)


def trained(scope):
    with scope:
        model = make_model()
        model.compile(keras.optimizers.SGD(0.1), "mse", jit_compile=False)
    inputs, targets = data()
    history = model.fit(inputs, targets, batch_size=BATCH, verbose=0, shuffle=False)
    return {"loss": history.history["loss"], **seen(model)}


alone = trained(contextlib.nullcontext())
replicas = trained(tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"]).scope())
json.dump({"alone": alone, "replicas": [replicas]}, sys.stdout)
