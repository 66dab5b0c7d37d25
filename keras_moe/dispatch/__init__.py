"""Dispatchers: moving tokens to their experts and back."""

from keras_moe.dispatch.choose import DispatchPlan
from keras_moe.dispatch.dense import DenseDispatcher
from keras_moe.dispatch.dispatcher import Dispatcher
from keras_moe.dispatch.einsum import EinsumDispatcher
from keras_moe.dispatch.expert_choice import ExpertChoiceDispatcher
from keras_moe.dispatch.grouped import GroupedDispatcher
from keras_moe.dispatch.layout import Rows, Stage
from keras_moe.dispatch.lookup import LookupDispatcher
from keras_moe.dispatch.padded_blocks import PaddedBlocksDispatcher
from keras_moe.dispatch.slots import SlotsDispatcher
from keras_moe.dispatch.walk import WalkDispatcher

__all__ = [
    "DenseDispatcher",
    "DispatchPlan",
    "Dispatcher",
    "EinsumDispatcher",
    "ExpertChoiceDispatcher",
    "GroupedDispatcher",
    "LookupDispatcher",
    "PaddedBlocksDispatcher",
    "Rows",
    "SlotsDispatcher",
    "Stage",
    "WalkDispatcher",
]
