"""Trains in several processes, each with devices of its own, as docs/devices.md has it.

    python train_processes.py PROCESS PROCESSES ADDRESS FOLDER [--die-in-epoch N] [--experts]

Each process writes the losses of its epochs to FOLDER, and goes on from what it finds there.
"""

import argparse
import json
import os
import signal
from pathlib import Path

parser = argparse.ArgumentParser()
parser.add_argument("process", type=int)
parser.add_argument("processes", type=int)
parser.add_argument("address")
parser.add_argument("folder", type=Path)
parser.add_argument("--die-in-epoch", type=int)
parser.add_argument("--experts", action="store_true")
arguments = parser.parse_args()
process, processes = arguments.process, arguments.processes

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false"  # run a few times only
)

import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_moe  # noqa: E402

if processes > 1:
    keras.distribution.initialize(arguments.address, processes, process)
keras.distribution.set_distribution(  # one process needs it too: a checkpoint is laid out by it
    keras_moe.distribution.expert_parallel(auto_shard_dataset=False)
    if arguments.experts
    else keras.distribution.DataParallel(auto_shard_dataset=False)
)

BATCH, STEPS, EPOCHS, WIDTH = 32, 10, 20, 8


def own_part(values):
    """Of each batch the rows that this process feeds: all, where experts are divided."""
    if arguments.experts:
        return values
    parts = values.reshape(STEPS, processes, BATCH // processes, -1)
    return parts[:, process].reshape(-1, values.shape[-1])


class Watch(keras.callbacks.Callback):
    def on_epoch_begin(self, epoch, logs=None):
        if epoch == arguments.die_in_epoch and process == processes - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_epoch_end(self, epoch, logs=None):
        with (arguments.folder / f"{process}.jsonl").open("a") as file:
            file.write(json.dumps({"epoch": epoch, **logs}) + "\n")


keras.utils.set_random_seed(1)
inputs = keras.Input((WIDTH,))
x = keras_moe.layers.MoE(8, 16, name="moe")(inputs)
x = keras_moe.layers.MoE(8, 16, router="sigmoid_bias", experts="glu", name="bias")(x)
model = keras.Model(inputs, keras.layers.Dense(1, name="head")(x))
model.compile(keras.optimizers.Adam(0.003), "mse")
model.optimizer.build(model.trainable_variables)

checkpoints = arguments.folder / "checkpoints"
if checkpoints.exists():
    model.load_weights(str(checkpoints))
checkpoint = keras.callbacks.OrbaxCheckpoint(str(checkpoints), save_on_background=False)

rng = np.random.default_rng(0)
inputs = rng.normal(size=(BATCH * STEPS, WIDTH)).astype("float32")
targets = inputs[:, :1] * inputs[:, 1:2]
model.fit(
    own_part(inputs),
    own_part(targets),
    batch_size=len(own_part(inputs)) // STEPS,
    initial_epoch=int(model.optimizer.iterations) // STEPS,
    epochs=EPOCHS,
    shuffle=False,
    verbose=0,
    callbacks=[Watch(), checkpoint],
)
if arguments.experts:
    keras_moe.distribution.assert_sharded(model)
