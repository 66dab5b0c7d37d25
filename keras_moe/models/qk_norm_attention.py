"""Attention with normalised queries and keys."""

from typing import Any

import keras

from keras_moe.core.types import Shape, Tensor
from keras_moe.layers.freezing import freeze_parts


@keras.saving.register_keras_serializable(package="keras_moe")
class QKNormAttention(keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` whose queries and keys pass a LayerNorm in each head.

    y = softmax(norm(x Wq) norm(x Wk)^T / sqrt(key_dim)) x Wv Wo

    Logits then cannot grow with the weights. The two norms have a scale and no offset.

    Args:
        num_heads: Positive integer, the attention heads.
        key_dim: Positive integer, the width of a head's queries and keys.
        **kwargs: The other arguments of `MultiHeadAttention`.

    Call arguments:
        As of `keras.layers.MultiHeadAttention`.

    Output shape:
        That of the queries, `(batch, n, d)`, unless `output_shape` says otherwise.

    Example:

    >>> import numpy as np
    >>> from keras_moe.models import QKNormAttention
    >>> x = np.ones((2, 16, 8), "float32")
    >>> tuple(QKNormAttention(num_heads=2, key_dim=4)(x, x).shape)
    (2, 16, 8)

    Reference:
        Dehghani et al. 2023, "Scaling Vision Transformers to 22 Billion Parameters", section 2.
    """

    def __init__(self, num_heads: int, key_dim: int, **kwargs: Any) -> None:
        super().__init__(num_heads, key_dim, **kwargs)
        self.query_norm, self.key_norm = (
            keras.layers.LayerNormalization(
                epsilon=1e-6, center=False, dtype=self.dtype_policy, name=name
            )
            for name in ("query_norm", "key_norm")
        )

    def build(self, query_shape: Shape, value_shape: Shape, key_shape: Shape | None = None) -> None:
        super().build(query_shape, value_shape, key_shape)
        per_head: Shape = (None, None, self.num_heads, self.key_dim)
        self.query_norm.build(per_head)
        self.key_norm.build(per_head)
        freeze_parts(self)  # Keras makes the projections in `build`, and leaves them trainable

    def _compute_attention(self, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Normalises queries and keys, then computes attention as Keras does."""
        return super()._compute_attention(
            self.query_norm(query), self.key_norm(key), *args, **kwargs
        )
