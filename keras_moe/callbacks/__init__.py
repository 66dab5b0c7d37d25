"""Who watches: callbacks that read what layers count."""

from keras_moe.callbacks.expert_monitor import ExpertMonitor
from keras_moe.inspection.alarms import ExpertAlarm

__all__ = ["ExpertAlarm", "ExpertMonitor"]
