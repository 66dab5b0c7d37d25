"""FLOPs of one call of a layer: by a rule for its class, or by what can be seen in the call."""

import functools
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import keras

from keras_moe import layers
from keras_moe.flops.trace import check_sizes, traced_flops
from keras_moe.models.position_embedding import PositionEmbedding


def count_products(layer: keras.layers.Layer, *inputs: Any, **arguments: Any) -> int:
    """Counts what one call multiplies: its products, and its sublayers' by their rules.

    A product is a call of `keras.ops.matmul`, `einsum`, `dot`, `tensordot`, `inner`, `vdot`, of a
    convolution or of `dot_product_attention`, and counts 2 FLOPs per multiply and add.

    Args:
        layer: A built layer or model.
        *inputs: The call's inputs, `keras.KerasTensor` of known shapes.
        **arguments: The call's other arguments.

    Returns:
        The FLOPs of the call, for the whole batch.

    Raises:
        ValueError: where a layer inside has a matrix, no product and no rule, is not built, or
            multiplies in a loop.

    Example:

    >>> import keras
    >>> from keras_moe.flops import count_products
    >>> layer = keras.layers.Dense(5)
    >>> layer.build((None, 3))
    >>> count_products(layer, keras.KerasTensor((1, 3)))
    30
    """
    return traced_flops(layer, inputs, arguments, find_rule, trusts_layer=True)


@functools.singledispatch
def layer_flops(layer: keras.layers.Layer, *inputs: Any, **arguments: Any) -> int:
    """Counts the FLOPs of one call; in sparse layers, those of the experts that a token goes to.

    A layer without a rule of its own is followed into its call (see `count_products`). A rule is
    needed where that is not what the layer takes for one example, as in `MoE`, or where it
    multiplies without `keras.ops`; it holds for subclasses too.

    Args:
        layer: A built layer or model.
        *inputs: The call's inputs, `keras.KerasTensor` of known shapes.
        **arguments: The call's other arguments.

    Returns:
        The FLOPs of the call, for the whole batch.

    Raises:
        ValueError: as `count_products`, and where `layer` has a matrix and no product.

    Example:

    >>> import keras
    >>> from keras_moe.flops import layer_flops
    >>> class Bilinear(keras.layers.Layer):
    ...     def build(self, shape):
    ...         self.kernel = self.add_weight(shape=(shape[-1], shape[-1]))
    ...     def call(self, x):
    ...         return keras.ops.sum(keras.ops.expand_dims(x, -1) * self.kernel, axis=-2)
    >>> @layer_flops.register
    ... def _(layer: Bilinear, inputs, **arguments) -> int:
    ...     return 2 * inputs.shape[0] * inputs.shape[-1] ** 2
    >>> layer = Bilinear()
    >>> layer.build((None, 3))
    >>> layer_flops(layer, keras.KerasTensor((1, 3)))
    18
    """
    return traced_flops(layer, inputs, arguments, find_rule, trusts_layer=False)


_WITHOUT_RULE = layer_flops.dispatch(object)


def find_rule(layer: keras.layers.Layer) -> tuple[Callable[..., int] | None, bool]:
    """Returns a layer's rule, or None to follow its call; and whether it may multiply nothing."""
    rule = layer_flops.dispatch(type(layer))
    is_followed = rule in (_WITHOUT_RULE, count_products)
    return None if is_followed else rule, rule is not _WITHOUT_RULE


@layer_flops.register
def _moe_flops(layer: layers.MoE, inputs: Any, **_: Any) -> int:
    """Router, k of E experts and shared experts, whatever the dispatcher, capacity or padding."""
    check_sizes(inputs)
    *token_axes, width = inputs.shape
    tokens = math.prod(token_axes)
    decisions = tokens if layer.routing_level == "token" else token_axes[0]
    flops = layer_flops(layer.router, keras.KerasTensor((decisions, width)))
    every_expert = keras.KerasTensor((layer.num_experts, tokens, width), layer.compute_dtype)
    # Experts that differ count as their mean.
    flops += round(
        Fraction(
            layer_flops(layer.experts, every_expert) * layer.router.experts_per_token,
            layer.num_experts,
        )
    )
    if layer.shared_experts is not None:
        shared = keras.KerasTensor((1, tokens, width), layer.compute_dtype)
        flops += layer_flops(layer.shared_experts, shared)
    return flops


@layer_flops.register
def _rnn_flops(layer: keras.layers.RNN, sequences: Any, *_states: Any, **_: Any) -> int:
    """One step of the cell, times the steps: backends loop, or fuse the loop."""
    check_sizes(sequences)
    batch, steps, *features = sequences.shape
    states = keras.tree.map_structure(
        lambda state: keras.KerasTensor(state.shape, layer.compute_dtype),
        layer.get_initial_state(batch),
    )
    step = keras.KerasTensor((batch, *features), layer.compute_dtype)
    return int(steps * layer_flops(layer.cell, step, states))


@layer_flops.register
def _time_distributed_flops(layer: keras.layers.TimeDistributed, inputs: Any, **_: Any) -> int:
    check_sizes(inputs)
    batch, steps, *features = inputs.shape
    return int(
        steps * layer_flops(layer.layer, keras.KerasTensor((batch, *features), inputs.dtype))
    )


# Their matrices are looked up, added or scaled with; what they multiply can be seen.
for _layer_class in (
    PositionEmbedding,
    keras.layers.BatchNormalization,
    keras.layers.Embedding,
    keras.layers.GroupNormalization,
    keras.layers.LayerNormalization,
    keras.layers.Normalization,
    keras.layers.PReLU,
    keras.layers.RMSNormalization,
):
    layer_flops.register(_layer_class, count_products)
