"""Who watches: callbacks that read what layers count."""

from keras_moe.callbacks.alarms import ExpertAlarm
from keras_moe.callbacks.expert_monitor import ExpertMonitor

__all__ = ["ExpertAlarm", "ExpertMonitor"]
