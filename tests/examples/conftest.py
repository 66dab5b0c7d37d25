"""Tests of the examples and the studies, which are scripts: their folders go on the path first."""

import os
import sys
from pathlib import Path

_EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(_EXAMPLES), str(_EXAMPLES / "studies")]

# TensorFlow Recommenders needs Keras 2 as `tf.keras` from the process's start: `make test-tfrs`.
_LEGACY = {"TF_USE_LEGACY_KERAS": "1", "KERAS_BACKEND": "tensorflow"}
if any(os.environ.get(name) != value for name, value in _LEGACY.items()):
    collect_ignore = ["test_recommend_movies.py", "studies/test_movies_study.py"]
