"""Who carries: moving tokens to their experts and back."""

from keras_moe.dispatch.blocks import BlocksCarrier
from keras_moe.dispatch.capacity import CapacityCarrier
from keras_moe.dispatch.carrier import Carrier
from keras_moe.dispatch.dense import DenseCarrier
from keras_moe.dispatch.einsum import EinsumCarrier
from keras_moe.dispatch.expert_choice import ExpertChoiceCarrier
from keras_moe.dispatch.grouped import GroupedCarrier
from keras_moe.dispatch.layout import Stage
from keras_moe.dispatch.lookup import LookupCarrier
from keras_moe.dispatch.planner import DispatchPlan

__all__ = [
    "BlocksCarrier",
    "CapacityCarrier",
    "Carrier",
    "DenseCarrier",
    "DispatchPlan",
    "EinsumCarrier",
    "ExpertChoiceCarrier",
    "GroupedCarrier",
    "LookupCarrier",
    "Stage",
]
