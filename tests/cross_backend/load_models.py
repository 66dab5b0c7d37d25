"""Loads what the other processes saved, with no custom_objects, and stores its predictions."""

import sys
from pathlib import Path

import keras
import numpy as np

import keras_moe  # noqa: F401  (registers the layers)

rng = np.random.default_rng(1)
ids = rng.integers(1, 20, size=(9, 6)).astype("int32")
ids[:3, 4:] = 0

folder, outputs = Path(sys.argv[1]), {}
for path in sorted(folder.glob("*.keras")):
    saved_on, name = path.stem.split("-")
    # Keras saves an optimizer's class as the backend's own; layers and weights load everywhere.
    model = keras.saving.load_model(path, compile=False)
    outputs.setdefault(saved_on, {})[name] = model.predict(ids, verbose=0)
for saved_on, arrays in outputs.items():
    np.savez(folder / f"{saved_on}-{keras.backend.backend()}.npz", **arrays)
