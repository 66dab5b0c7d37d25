"""Pictures of what experts do: functions of a model and data that return matplotlib figures.

They need matplotlib, which the extra `plot` installs. They open no window and change no global
state of matplotlib. Save a figure with `figure.savefig("load.png")`; a notebook shows it where it
is the last value of a cell.
"""

from keras_moe.plots.classes import class_by_expert
from keras_moe.plots.load import expert_load, load_over_time
from keras_moe.plots.pairs import coactivation, slot_similarity
from keras_moe.plots.patches import patch_experts
from keras_moe.plots.slots import slot_patches
from keras_moe.plots.tasks import task_gates
from keras_moe.plots.tokens import token_experts

__all__ = [
    "class_by_expert",
    "coactivation",
    "expert_load",
    "load_over_time",
    "patch_experts",
    "slot_patches",
    "slot_similarity",
    "task_gates",
    "token_experts",
]
