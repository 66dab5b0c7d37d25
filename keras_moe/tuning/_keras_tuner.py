"""The optional package keras-tuner."""

from typing import Any


def import_keras_tuner() -> Any:
    """Returns the module, or says how to install it."""
    try:
        import keras_tuner  # type: ignore[import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError(
            "The hypermodels and objectives of keras_moe.tuning need keras-tuner. Install it with "
            '`pip install "keras-moe[tuner]"`.'
        ) from error
    return keras_tuner
