"""HTML report about a model's experts."""

from keras_moe.reporting.report import report

__all__ = ["report"]
