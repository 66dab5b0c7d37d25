"""Pictures of what experts do: each takes a model and data and returns a matplotlib `Figure`.

They need matplotlib: `pip install "keras-moe[plot]"`. No window is opened and no global state of
matplotlib is touched: `figure.savefig("load.png")`.
"""

from keras_moe.plots.classes import class_by_expert
from keras_moe.plots.load import expert_load, load_over_time
from keras_moe.plots.pairs import coactivation, slot_similarity
from keras_moe.plots.patches import patch_experts
from keras_moe.plots.tasks import task_gates
from keras_moe.plots.tokens import token_experts

__all__ = [
    "class_by_expert",
    "coactivation",
    "expert_load",
    "load_over_time",
    "patch_experts",
    "slot_similarity",
    "task_gates",
    "token_experts",
]
