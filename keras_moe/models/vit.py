"""Vision Transformers whose feed-forward layers may be mixtures of experts."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
from keras import layers

from keras_moe.core import checks
from keras_moe.core.types import Activation
from keras_moe.layers import MoE, SoftMoE, SwitchFFN
from keras_moe.models import _blocks
from keras_moe.models._masked_mean import MaskedMean
from keras_moe.models._masked_model import MaskedModel
from keras_moe.models._patch_embedding import PatchEmbedding
from keras_moe.models.position_embedding import PositionEmbedding

VIT_SIZES: dict[str, dict[str, int]] = {
    # Ti and S: Touvron et al. 2020 (DeiT), table 1; B, L and H: Dosovitskiy et al. 2020, table 1.
    "Ti": {"width": 192, "depth": 12, "num_heads": 3, "mlp_dim": 768},
    "S": {"width": 384, "depth": 12, "num_heads": 6, "mlp_dim": 1536},
    "B": {"width": 768, "depth": 12, "num_heads": 12, "mlp_dim": 3072},
    "L": {"width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096},
    "H": {"width": 1280, "depth": 32, "num_heads": 16, "mlp_dim": 5120},
}

_MIXTURES: dict[str, Callable[..., keras.layers.Layer]] = {
    "moe": MoE,
    "soft_moe": SoftMoE,
    "switch": SwitchFFN,
}


def vit(
    input_shape: Sequence[int],
    num_classes: int | None,
    *,
    size: str | None = None,
    patch_size: int = 16,
    width: int | None = None,
    depth: int | None = None,
    num_heads: int | None = None,
    mlp_dim: int | None = None,
    feed_forward: str | Callable[[int], keras.layers.Layer] = "dense",
    feed_forward_arguments: Mapping[str, Any] | None = None,
    moe_layers: str | int | Sequence[int] = "last_half",
    activation: Activation = "gelu",
    qk_norm: bool = False,
    dropout: float = 0.0,
    classifier_activation: Activation = "softmax",
    name: str = "vit",
) -> keras.Model:
    """Builds a Vision Transformer, a functional model from images to classes.

    x = patches(image) @ W + b + positions
    for each block: x = x + attention(norm(x)); x = x + feed_forward(norm(x))
    classes = activation(mean_n(norm(x)) @ head)

    Pre-norm, learned positions, global average pooling, no class token. The blocks of `moe_layers`
    have the feed-forward that is asked for, the others a dense one of `mlp_dim` hidden units.
    Initial weights follow `keras.utils.set_random_seed`.

    `model(images, mask=mask)` takes a mask `(batch, height, width)`, True at pixels of the image,
    for images that were filled up to one shape. Other pixels count as 0, and a patch without any
    pixel of the image is padding to attention, mixtures and the mean.

    Args:
        input_shape: `(height, width, channels)` of the images, which divide into whole patches.
        num_classes: Positive integer, the classes; None for a model that returns the pooled
            features `(batch, width)`.
        size: `"Ti"`, `"S"`, `"B"`, `"L"` or `"H"`, which sets `width`, `depth`, `num_heads` and
            `mlp_dim` where they are None. Defaults to `None`.
        patch_size: Positive integer, the side of a patch in pixels. Defaults to `16`.
        width: Positive integer, the model width d, a multiple of `num_heads`. Defaults to `None`.
        depth: Positive integer, the number of blocks. Defaults to `None`.
        num_heads: Positive integer, the attention heads. Defaults to `None`.
        mlp_dim: Positive integer, the hidden units of a dense feed-forward, and of each expert
            unless `feed_forward_arguments` say otherwise; None without a `size` for 4 `width`.
            Defaults to `None`.
        feed_forward: `"dense"`, `"moe"`, `"soft_moe"`, `"switch"`, or a function that takes a
            block's index and returns a new layer from `(batch, patches, width)` to the same.
            Defaults to `"dense"`.
        feed_forward_arguments: Arguments of the `MoE`, `SoftMoE` or `SwitchFFN` of that name, such
            as `{"num_experts": 8}`, which they need. Defaults to `None`.
        moe_layers: The blocks that take `feed_forward`: `"last_half"` (Soft MoE's and V-MoE's
            choice), an integer n for every n-th block, or a sequence of indices from 0. Defaults to
            `"last_half"`.
        activation: Activation of the hidden units; experts by name take it too, unless
            `feed_forward_arguments` say otherwise. Defaults to `"gelu"`.
        qk_norm: Whether queries and keys are normalised (Dehghani et al. 2023, section 2).
            Defaults to `False`.
        dropout: Float in [0, 1), dropout on the embedded patches, after attention, and after both
            layers of a feed-forward. Defaults to `0.0`.
        classifier_activation: Activation of the head; None for logits. Defaults to `"softmax"`.
        name: Name of the model. Defaults to `"vit"`.

    Returns:
        A `keras.Model` from `(batch, height, width, channels)` to `(batch, num_classes)`, float32.
        The mixtures are its layers `block_{index}_{feed_forward}`.

    Raises:
        ValueError: on images that do not divide into patches, an unknown size or feed-forward,
            blocks out of range, or sizes that are missing or do not fit together.

    Example:

    >>> from keras_moe.models import vit
    >>> model = vit(
    ...     (8, 8, 1), 10, patch_size=2, width=32, depth=2, num_heads=2,
    ...     feed_forward="soft_moe", feed_forward_arguments={"num_experts": 16},
    ... )
    >>> model.get_layer("block_1_soft_moe").num_experts
    16

    Reference:
        Dosovitskiy et al. 2020, "An Image is Worth 16x16 Words", section 3.1; Puigcerver et al.
        2023, "From Sparse to Soft Mixtures of Experts", section 3 (mixtures in the last half, no
        class token).
    """
    _check_patches(input_shape, patch_size)
    sizes = _checked_sizes(size, width=width, depth=depth, num_heads=num_heads, mlp_dim=mlp_dim)
    if num_classes is not None:
        checks.positive_int("num_classes", num_classes)
    dropout = checks.rate("dropout", dropout)
    blocks = _blocks.Blocks(
        depth=sizes["depth"],
        num_heads=sizes["num_heads"],
        mlp_dim=sizes["mlp_dim"],
        activation=activation,
        dropout=dropout,
        qk_norm=qk_norm,
        is_causal=False,
        make_mixture=_blocks.mixture_factory(
            _MIXTURES,
            feed_forward,
            feed_forward_arguments,
            {"hidden_dim": sizes["mlp_dim"], "activation": activation, "dropout": dropout},
        ),
        mixture_blocks=_blocks.checked_blocks(moe_layers, sizes["depth"]),
    )
    images = keras.Input(tuple(input_shape), name="images")
    x = PatchEmbedding(
        sizes["width"],
        patch_size,
        strides=patch_size,
        data_format="channels_last",
        name="patch_embedding",
    )(images)
    # A patch has the position of its place in the grid, also where others are padding.
    x = PositionEmbedding(counts_padding=True, name="position_embedding")(x)
    x = blocks(_blocks.drop(x, dropout, "embedding_dropout"))
    x = _blocks.norm(x, "encoder_norm")
    x = MaskedMean(name="pooling")(x)
    if num_classes is not None:
        x = _head(num_classes, classifier_activation)(x)
    return MaskedModel(images, x, name=name)


def _head(num_classes: int, activation: Activation) -> layers.Dense:
    """The last layer, whose first predictions are uniform (Dosovitskiy et al.'s, V-MoE's code)."""
    return layers.Dense(
        num_classes,
        activation=activation,
        kernel_initializer="zeros",
        dtype="float32",  # a bfloat16 softmax over many classes does not sum to 1
        name="head",
    )


def _check_patches(input_shape: Sequence[int], patch_size: int) -> None:
    """Checks that an image divides into patches."""
    checks.positive_int("patch_size", patch_size)
    shape = tuple(input_shape)
    if len(shape) != 3 or not all(isinstance(side, int) and side > 0 for side in shape):
        checks.fail(
            "`input_shape` must be (height, width, channels), positive integers.",
            input_shape=input_shape,
        )
    height, width, _ = shape
    if height % patch_size or width % patch_size:
        checks.fail(
            f"`input_shape` must divide into whole patches of {patch_size} x {patch_size} pixels "
            f"(`patch_size`).",
            input_shape=shape,
            patch_size=patch_size,
        )


def _checked_sizes(size: str | None, **parts: int | None) -> dict[str, int]:
    """Returns width, depth, num_heads and mlp_dim, from the arguments or else from the size."""
    sizes = dict(parts)
    if size is not None:
        named = VIT_SIZES[checks.one_of("size", size, VIT_SIZES)]
        sizes = {part: named[part] if value is None else value for part, value in sizes.items()}
    for part in ("width", "depth", "num_heads"):
        if sizes[part] is None:
            checks.fail(f"`{part}` must be a positive integer where `size` is None.", **sizes)
    return _blocks.checked_sizes(**sizes)
