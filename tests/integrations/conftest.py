"""These tests need Keras 2 as `tf.keras` and Keras 3 on TensorFlow: a process of their own.

TF_USE_LEGACY_KERAS=1 KERAS_BACKEND=tensorflow pytest tests/integrations
"""

import os

import pytest

REQUIRED_ENVIRONMENT = {"TF_USE_LEGACY_KERAS": "1", "KERAS_BACKEND": "tensorflow"}

if any(os.environ.get(name) != value for name, value in REQUIRED_ENVIRONMENT.items()):
    raise pytest.UsageError(
        "tests/integrations needs a process of its own: "
        + " ".join(f"{name}={value}" for name, value in REQUIRED_ENVIRONMENT.items())
        + " pytest tests/integrations"
    )
