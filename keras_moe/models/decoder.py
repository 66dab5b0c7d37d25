"""Decoder-only Transformers whose feed-forward layers may be mixtures of experts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import layers
from keras.src.backend import get_keras_mask, set_keras_mask

from keras_moe.core import checks
from keras_moe.core.types import Activation
from keras_moe.layers import MoE, SoftMoE, SwitchFFN
from keras_moe.models import _blocks
from keras_moe.models._masked_model import MaskedModel
from keras_moe.models.masked_embedding import MaskedEmbedding
from keras_moe.models.position_embedding import PositionEmbedding

_MIXTURES: dict[str, Callable[..., keras.layers.Layer]] = {"moe": MoE, "switch": SwitchFFN}


@keras.saving.register_keras_serializable(package="keras_moe")
class DecoderModel(MaskedModel):
    """The functional model that `decoder` returns."""

    def compute_metrics(
        self, x: Any, y: Any, y_pred: Any, sample_weight: Any = None
    ) -> dict[str, Any]:
        """Leaves padding out of the metrics of `fit` on JAX too.

        The logits come out of a function that was differentiated there, without their mask.
        """
        if get_keras_mask(y_pred) is None:
            (tokens,) = keras.tree.flatten(x)
            set_keras_mask(y_pred, self.get_layer("token_embedding").compute_mask(tokens))
        metrics: dict[str, Any] = super().compute_metrics(x, y, y_pred, sample_weight)
        return metrics


def decoder(
    vocabulary_size: int,
    *,
    width: int,
    depth: int,
    num_heads: int,
    mlp_dim: int | None = None,
    max_length: int = 1024,
    padding_id: int | None = None,
    feed_forward: str | Callable[[int], keras.layers.Layer] = "dense",
    feed_forward_arguments: Mapping[str, Any] | None = None,
    moe_layers: str | int | Sequence[int] = 1,
    activation: Activation = "gelu",
    qk_norm: bool = False,
    dropout: float = 0.0,
    name: str = "decoder",
) -> keras.Model:
    """Builds a language model, a functional model from tokens to logits of the next ones.

    x[n] = embedding[tokens[n]] + positions[n - first], from the first real token on
    for each block: x = x + attention(norm(x)), causal; x = x + feed_forward(norm(x))
    logits[n] = norm(x)[n] @ head + bias, of token n + 1

    Pre-norm, learned positions. The logits at n depend on tokens 0 to n alone, so that padding on
    the right changes nothing before it, and what would break this is refused: routing in which
    experts choose among all tokens, later ones too, and a capacity with `top_k` above 1. The
    blocks of `moe_layers` have the feed-forward that is asked for, the others a dense one of
    `mlp_dim` hidden units. Initial weights follow `keras.utils.set_random_seed`.

    Padding, on any side, is `padding_id` and what `model(tokens, mask=mask)` masks. No token
    attends to it, it goes to no expert, and it enters no count, no loss of a router and, in `fit`,
    neither loss nor metrics. The logits of real tokens are those without it. One thing counts it:
    a `capacity_factor`, whose slots are a share of all places.

    Args:
        vocabulary_size: Positive integer, the tokens there are; 256 for bytes.
        width: Positive integer, the model width d, a multiple of `num_heads`.
        depth: Positive integer, the number of blocks.
        num_heads: Positive integer, the attention heads.
        mlp_dim: Positive integer, the hidden units of a dense feed-forward, and of each expert
            unless `feed_forward_arguments` say otherwise; None for 4 `width`. Defaults to `None`.
        max_length: Positive integer, the longest sequence, padding included. Defaults to `1024`.
        padding_id: Integer in [0, vocabulary_size), the id that stands for padding; None where all
            ids are real. Defaults to `None`.
        feed_forward: `"dense"`, `"moe"`, `"switch"`, or a function that takes a block's index and
            returns a new layer from `(batch, n, width)` to the same, which mixes no tokens and
            supports masks; a `MoE` whose router reads token ids gets them. Defaults to `"dense"`.
        feed_forward_arguments: Arguments of the `MoE` or `SwitchFFN` of that name, such as
            `{"num_experts": 8}`, which they need. With a capacity, whether a token finds room
            depends on the tokens before it and on the batch; without, as `MoE` has it, nothing is
            dropped. Defaults to `None`.
        moe_layers: The blocks that take `feed_forward`: an integer n for every n-th block (1 for
            all, as Mixtral has them; 2 for Switch's and Llama 4 Maverick's interleaving),
            `"last_half"`, or a sequence of indices from 0. Defaults to `1`.
        activation: Activation of the hidden units; experts by name take it too, unless
            `feed_forward_arguments` say otherwise. Defaults to `"gelu"`.
        qk_norm: Whether queries and keys are normalised (Dehghani et al. 2023, section 2).
            Defaults to `False`.
        dropout: Float in [0, 1), dropout on the embedded tokens, after attention, and after both
            layers of a feed-forward. Defaults to `0.0`.
        name: Name of the model. Defaults to `"decoder"`.

    Returns:
        A `keras.Model` from integers `(batch, n)` to `(batch, n, vocabulary_size)`, float32, for
        any n up to `max_length`. The mixtures are its layers `block_{index}_{feed_forward}`. The
        logits have the mask of the tokens.

    Raises:
        ValueError: on an unknown feed-forward, one that is not causal, blocks out of range, sizes
            that do not fit together, or a `padding_id` that is no id.

    Example:

    >>> import numpy as np
    >>> from keras_moe.models import decoder
    >>> model = decoder(
    ...     256, width=32, depth=2, num_heads=2,
    ...     feed_forward="moe", feed_forward_arguments={"num_experts": 4, "top_k": 1},
    ... )
    >>> tuple(model(np.array([list(b"to be, or")])).shape)
    (1, 9, 256)

    Reference:
        Radford et al. 2019, "Language Models are Unsupervised Multitask Learners", section 2.3;
        Fedus et al. 2021, "Switch Transformers", section 2; Jiang et al. 2024, "Mixtral of
        Experts", section 2.
    """
    checks.positive_int("vocabulary_size", vocabulary_size)
    sizes = _blocks.checked_sizes(width, depth, num_heads, mlp_dim)
    if padding_id is not None:
        checks.int_between("padding_id", padding_id, 0, vocabulary_size - 1, "vocabulary_size - 1")
    dropout = checks.rate("dropout", dropout)
    make_mixture = _blocks.mixture_factory(
        _MIXTURES,
        feed_forward,
        feed_forward_arguments,
        {"hidden_dim": sizes["mlp_dim"], "activation": activation, "dropout": dropout},
    )
    blocks = _blocks.Blocks(
        depth=depth,
        num_heads=num_heads,
        mlp_dim=sizes["mlp_dim"],
        activation=activation,
        dropout=dropout,
        qk_norm=qk_norm,
        is_causal=True,
        make_mixture=None if make_mixture is None else _causal(make_mixture),
        mixture_blocks=_blocks.checked_blocks(moe_layers, depth),
    )
    tokens = keras.Input((None,), dtype="int32", name="tokens")
    x = MaskedEmbedding(
        vocabulary_size,
        width,
        padding_id,
        embeddings_initializer=keras.initializers.RandomNormal(stddev=0.02),  # GPT-2's code
        name="token_embedding",
    )(tokens)
    x = PositionEmbedding(max_length=max_length, name="position_embedding")(x)
    x = blocks(_blocks.drop(x, dropout, "embedding_dropout"), tokens)
    x = _blocks.norm(x, "decoder_norm")
    # Zeros: the first predictions are uniform. float32, as the head of `vit`.
    head = layers.Dense(vocabulary_size, kernel_initializer="zeros", dtype="float32", name="head")
    return DecoderModel(tokens, head(x), name=name)


def _causal(make: _blocks.MakeLayer) -> _blocks.MakeLayer:
    """Checks what `make` returns: no token's route may depend on a later one."""

    def make_causal(block: int) -> keras.layers.Layer:
        layer = make(block)
        reason = _looks_ahead(layer)
        if reason is not None:
            checks.fail(f"`feed_forward` must be causal: {reason}.", layer=layer)
        return layer

    return make_causal


def _looks_ahead(layer: keras.layers.Layer) -> str | None:
    """Says in which way a mixture lets tokens depend on later ones, None where it does not."""
    if isinstance(layer, SoftMoE) and not layer.causal:
        return "the slots of `SoftMoE` mix all tokens, unless it has `causal=True`"
    if not isinstance(layer, MoE):
        return None
    if layer.routing_level == "example":
        return '`routing_level="example"` routes by the mean of all tokens'
    return layer.router.looks_ahead(has_capacity=layer.has_capacity)
