"""A rule that counts the products of a layer's call."""

from typing import Any

import keras

from keras_moe.flops.trace import traced_flops


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
    from keras_moe.flops.layer_flops import find_rule  # it rests on this function

    return traced_flops(layer, inputs, arguments, find_rule, trusts_layer=True)
