"""The optional package keras-tuner."""

from typing import Any

from keras_moe.core.optional import import_of_extra


def import_keras_tuner() -> Any:
    """Returns the module, or says how to install it."""
    user = "A hypermodel or objective of `keras_moe.tuning`"
    return import_of_extra("tuner", user, "keras_tuner")
