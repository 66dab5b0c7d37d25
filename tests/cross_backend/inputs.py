"""Inputs of any model here, equal in every process."""

import keras
import numpy as np

ROWS_OF_IDS = 20  # of every embedding table
UNKNOWN_LENGTH = 7


def inputs_of(model, examples, seed):
    """Ids with padding at the end, or normal numbers, by input."""
    rng = np.random.default_rng(seed)

    def array(tensor):
        shape = (examples, *(size or UNKNOWN_LENGTH for size in tensor.shape[1:]))
        if keras.backend.standardize_dtype(tensor.dtype) != "int32":
            return rng.normal(size=shape).astype("float32")
        ids = rng.integers(1, ROWS_OF_IDS, size=shape).astype("int32")
        if ids.ndim == 2:
            ids[: examples // 2, -2:] = 0
        return ids

    if isinstance(model.input, dict):
        return {name: array(tensor) for name, tensor in sorted(model.input.items())}
    return array(model.input)
