"""The version, read by the build and by `keras_moe.__version__`."""

__version__ = "0.1.0"
