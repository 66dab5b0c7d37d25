"""Ready-made functional models."""

from keras_moe.models import features
from keras_moe.models.decoder import decoder
from keras_moe.models.history_mean import HistoryMean
from keras_moe.models.masked_embedding import MaskedEmbedding
from keras_moe.models.multitask_ranker import multitask_ranker
from keras_moe.models.position_embedding import PositionEmbedding
from keras_moe.models.qk_norm_attention import QKNormAttention
from keras_moe.models.task_gates import task_gates
from keras_moe.models.vit import VIT_SIZES, vit

__all__ = [
    "VIT_SIZES",
    "HistoryMean",
    "MaskedEmbedding",
    "PositionEmbedding",
    "QKNormAttention",
    "decoder",
    "features",
    "multitask_ranker",
    "task_gates",
    "vit",
]
