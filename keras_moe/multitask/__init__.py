"""Training of several tasks: labels that are missing."""

from keras_moe.multitask.missing_labels import MaskedLoss, MaskedMetric

__all__ = ["MaskedLoss", "MaskedMetric"]
