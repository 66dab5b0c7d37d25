"""Tests of the examples, which are scripts: their folder goes on the path first."""

import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

# TensorFlow Recommenders needs Keras 2 as `tf.keras` from the process's start: `make test-tfrs`.
_LEGACY = {"TF_USE_LEGACY_KERAS": "1", "KERAS_BACKEND": "tensorflow"}
if any(os.environ.get(name) != value for name, value in _LEGACY.items()):
    collect_ignore = ["test_recommend_movies.py"]
