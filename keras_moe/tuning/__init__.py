"""Search spaces, hypermodels and objectives for keras-tuner."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from keras_moe.tuning.active_cost import ActiveCost
from keras_moe.tuning.check_project import check_project
from keras_moe.tuning.mmoe_space import mmoe_space
from keras_moe.tuning.moe_space import moe_space
from keras_moe.tuning.soft_moe_space import soft_moe_space
from keras_moe.tuning.watch_trials import watch_trials

if TYPE_CHECKING:
    from keras_moe.tuning.hyper_mmoe_recommender import HyperMMoERecommender
    from keras_moe.tuning.hyper_vit_moe import HyperViTMoE

__all__ = [
    "ActiveCost",
    "HyperMMoERecommender",
    "HyperViTMoE",
    "check_project",
    "mmoe_space",
    "moe_space",
    "soft_moe_space",
    "watch_trials",
]

# Their base class is keras-tuner's, which is optional.
_NEED_KERAS_TUNER = {
    "HyperMMoERecommender": "keras_moe.tuning.hyper_mmoe_recommender",
    "HyperViTMoE": "keras_moe.tuning.hyper_vit_moe",
}


def __getattr__(name: str) -> Any:
    if name in _NEED_KERAS_TUNER:
        return getattr(import_module(_NEED_KERAS_TUNER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
