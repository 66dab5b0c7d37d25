"""Loads what the other processes saved, with no custom_objects, and stores its predictions."""

import sys
from pathlib import Path

import keras
import numpy as np
from inputs import inputs_of

import keras_moe  # noqa: F401  (registers the layers)


def predicted_by(model, inputs):
    """A trace of TensorFlow's takes longer than a call without one."""
    if keras.backend.backend() == "jax":
        return model.predict(inputs, verbose=0)
    return keras.tree.map_structure(keras.ops.convert_to_numpy, model(inputs, training=False))


folder, outputs = Path(sys.argv[1]), {}
for path in sorted(folder.glob("*.keras")):
    saved_on, name = path.stem.split("-")
    # Keras saves an optimizer's class as the backend's own; layers and weights load everywhere.
    model = keras.saving.load_model(path, compile=False)
    predicted = predicted_by(model, inputs_of(model, examples=9, seed=1))
    if isinstance(predicted, dict):
        predicted = np.concatenate([predicted[task] for task in sorted(predicted)], axis=-1)
    outputs.setdefault(saved_on, {})[name] = predicted
for saved_on, arrays in outputs.items():
    np.savez(folder / f"{saved_on}-{keras.backend.backend()}.npz", **arrays)
