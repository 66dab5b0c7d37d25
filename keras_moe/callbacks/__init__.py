"""Callbacks that read the running counts of layers."""

from keras_moe.callbacks.expert_monitor import ExpertMonitor
from keras_moe.inspection.alarms import ExpertAlarm

__all__ = ["ExpertAlarm", "ExpertMonitor"]
