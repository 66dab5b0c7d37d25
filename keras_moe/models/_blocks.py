"""Pre-norm Transformer blocks, whose feed-forward layers may be mixtures."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
from keras import layers

from keras_moe.core import checks
from keras_moe.core.types import Activation, Config, Tensor
from keras_moe.layers import MoE
from keras_moe.models.qk_norm_attention import QKNormAttention

MakeLayer = Callable[[int], keras.layers.Layer]

_EPSILON = 1e-6  # of every LayerNorm: Dosovitskiy et al.'s code


@keras.saving.register_keras_serializable(package="keras_moe")
class Residual(layers.Add):
    """Adds a block's output to x. Padding stays as it is in x.

    Keras's own would forget it after a feed-forward that knows no masks.
    """

    def compute_mask(self, inputs: Any, mask: Any = None) -> Tensor | None:
        return None if mask is None else mask[0]


@dataclass(frozen=True)
class Blocks:
    """The blocks of one Transformer, `blocks(x (batch, n, width)) -> (batch, n, width)`.

    for each block: x = x + attention(norm(x)); x = x + feed_forward(norm(x))

    Called with the token ids, if x stands for tokens, for routers that read them. A mask of x
    reaches attention and mixtures, and is that of what is returned.

    Args:
        depth: the number of blocks.
        num_heads: attention heads, which divide the width.
        mlp_dim: hidden units of a dense feed-forward.
        activation: of these hidden units.
        dropout: after attention and after both layers of a feed-forward.
        qk_norm: whether queries and keys are normalised.
        is_causal: whether a token attends to itself and those before it only.
        make_mixture: makes the feed-forward of a block of `mixture_blocks`; None for a dense one.
        mixture_blocks: indices of blocks.
    """

    depth: int
    num_heads: int
    mlp_dim: int
    activation: Activation
    dropout: float
    qk_norm: bool
    is_causal: bool
    make_mixture: MakeLayer | None
    mixture_blocks: frozenset[int]

    def __call__(self, x: Tensor, token_ids: Tensor | None = None) -> Tensor:
        for block in range(self.depth):
            prefix = f"block_{block}"
            y = norm(x, f"{prefix}_attention_norm")
            x = self._residual(x, self._attention(y, prefix), f"{prefix}_attention")
            y = norm(x, f"{prefix}_feed_forward_norm")
            y = self._feed_forward(y, block, prefix, token_ids)
            x = self._residual(x, y, f"{prefix}_feed_forward")
        return x

    def _residual(self, x: Tensor, y: Tensor, prefix: str) -> Tensor:
        y = drop(y, self.dropout, f"{prefix}_dropout")
        return Residual(name=f"{prefix}_residual")([x, y])

    def _attention(self, x: Tensor, prefix: str) -> Tensor:
        make = QKNormAttention if self.qk_norm else layers.MultiHeadAttention
        attention = make(self.num_heads, x.shape[-1] // self.num_heads, name=f"{prefix}_attention")
        return attention(x, x, use_causal_mask=self.is_causal)

    def _feed_forward(self, x: Tensor, block: int, prefix: str, token_ids: Tensor | None) -> Tensor:
        if self.make_mixture is not None and block in self.mixture_blocks:
            return _checked_mixture(self.make_mixture(block), x, token_ids)
        width = x.shape[-1]
        x = layers.Dense(self.mlp_dim, self.activation, name=f"{prefix}_mlp_hidden")(x)
        x = drop(x, self.dropout, f"{prefix}_mlp_hidden_dropout")
        return layers.Dense(width, name=f"{prefix}_mlp_output")(x)


def norm(x: Tensor, name: str) -> Tensor:
    """A LayerNorm of x."""
    return layers.LayerNormalization(epsilon=_EPSILON, name=name)(x)


def drop(x: Tensor, rate: float, name: str) -> Tensor:
    """Dropout of x, and no layer where the rate is 0."""
    return layers.Dropout(rate, name=name)(x) if rate else x


def checked_sizes(
    width: int | None, depth: int | None, num_heads: int | None, mlp_dim: int | None
) -> dict[str, int]:
    """Checks sizes that fit together; `mlp_dim` is 4 `width` where it is None."""
    sizes = {
        name: checks.positive_int(name, value)
        for name, value in (("width", width), ("depth", depth), ("num_heads", num_heads))
    }
    if sizes["width"] % sizes["num_heads"]:
        checks.fail(
            "`width` must be a multiple of `num_heads`.",
            width=sizes["width"],
            num_heads=sizes["num_heads"],
        )
    hidden = 4 * sizes["width"] if mlp_dim is None else checks.positive_int("mlp_dim", mlp_dim)
    return {**sizes, "mlp_dim": hidden}


def checked_blocks(moe_layers: str | int | Sequence[int], depth: int) -> frozenset[int]:
    """Returns the indices of the blocks that take the mixture."""
    if moe_layers == "last_half":
        return frozenset(range(depth - depth // 2, depth))
    if isinstance(moe_layers, int):
        every = checks.int_between("moe_layers", moe_layers, 1, depth, "depth")
        return frozenset(range(every - 1, depth, every))
    if isinstance(moe_layers, Sequence) and not isinstance(moe_layers, str):
        for block in moe_layers:
            checks.int_between("moe_layers", block, 0, depth - 1, "depth - 1")
        if len(set(moe_layers)) != len(moe_layers):
            checks.fail("`moe_layers` must name a block once.", moe_layers=moe_layers)
        return frozenset(moe_layers)
    checks.fail(
        "`moe_layers` must be 'last_half', an integer n for every n-th block, or a sequence of "
        "block indices.",
        moe_layers=moe_layers,
    )


def mixture_factory(
    mixtures: Mapping[str, Callable[..., keras.layers.Layer]],
    feed_forward: str | MakeLayer,
    arguments: Mapping[str, Any] | None,
    defaults: Config,
) -> MakeLayer | None:
    """Returns the function that makes the feed-forward of a block, None for the dense one.

    Args:
        mixtures: the layers that have a name.
        feed_forward: "dense", one of these names, or a function of a block's index.
        arguments: the user's arguments of the layer of that name.
        defaults: arguments of it that `arguments` may replace.
    """
    if isinstance(feed_forward, str) and feed_forward in mixtures:
        make, name = mixtures[feed_forward], feed_forward
        if "num_experts" not in (arguments or {}):
            checks.fail(
                f"`feed_forward_arguments` must give the `num_experts` of {name!r}.",
                feed_forward_arguments=arguments,
            )
        return lambda block: make(
            **{**defaults, **(arguments or {}), "name": f"block_{block}_{name}"}
        )
    if arguments is not None:
        checks.fail(
            f"`feed_forward_arguments` belong to a `feed_forward` of the names {sorted(mixtures)}.",
            feed_forward=feed_forward,
            feed_forward_arguments=arguments,
        )
    if feed_forward == "dense":
        return None
    if isinstance(feed_forward, str | keras.layers.Layer) or not callable(feed_forward):
        checks.fail(
            f"`feed_forward` must be one of {sorted(['dense', *mixtures])} or a function of the "
            "block's index that returns a new layer (one layer for all blocks would share its "
            "weights).",
            feed_forward=feed_forward,
        )
    return feed_forward


def _checked_mixture(layer: Any, x: Tensor, token_ids: Tensor | None) -> Tensor:
    """Calls a block's feed-forward and checks that the residual can be added to what it returns."""
    if not isinstance(layer, keras.layers.Layer):
        checks.fail("`feed_forward` must return a Keras layer.", returned=layer)
    reads_ids = token_ids is not None and isinstance(layer, MoE) and layer.router.needs_token_ids
    y = layer(x, token_ids=token_ids) if reads_ids else layer(x)
    if getattr(y, "shape", None) != x.shape:
        checks.fail(
            f"`feed_forward` must return a layer that keeps the shape {x.shape}.",
            **{"output shape": getattr(y, "shape", type(y).__name__)},
        )
    return y
