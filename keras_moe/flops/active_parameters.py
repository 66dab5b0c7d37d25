"""The weights that take part in the prediction for one token."""

import math
from fractions import Fraction

import keras

from keras_moe import layers
from keras_moe.core import checks


def active_parameters(model: keras.layers.Layer) -> int:
    """Counts the parameters of a model that one token meets.

    active = all - sum over sparse layers of (E - k) / E of their experts' parameters

    A parameter is what training may change, whether it is frozen or not; running counts, moving
    statistics and the state of random seeds are none. A shared weight counts once. `SoftMoE` and
    `MMoE` use all of theirs. Experts that differ count as their mean. A layer inside that no call
    has built yet has no parameters.

    Args:
        model: A built model of any kind, or a layer.

    Returns:
        The number of parameters.

    Raises:
        ValueError: if the model is none, or is not built.

    Example:

    >>> from keras_moe import layers
    >>> from keras_moe.flops import active_parameters
    >>> layer = layers.MoE(num_experts=8, hidden_dim=64, top_k=2, use_bias=False)
    >>> layer.build((None, 16))
    >>> router, experts = 16 * 8, 2 * (16 * 64 + 64 * 16)
    >>> active_parameters(layer) == router + experts
    True
    """
    checks.built("model", model)
    active: dict[int, Fraction] = {}
    _collect(model, Fraction(1), active)
    return round(sum(active.values()))


def _collect(layer: keras.layers.Layer, share: Fraction, active: dict[int, Fraction]) -> None:
    """Adds a layer's weights by id, with the largest share in which any layer uses them."""
    for weight in layer._trainable_variables:  # trainable by birth, frozen or not
        size = share * math.prod(weight.shape)
        active[id(weight)] = max(size, active.get(id(weight), Fraction(0)))
    for sublayer in layer._flatten_layers(include_self=False, recursive=False):
        is_sparse = isinstance(layer, layers.MoE) and sublayer is layer.experts
        chosen = Fraction(1)
        if is_sparse:
            chosen = Fraction(layer.router.experts_per_token, layer.num_experts)
        _collect(sublayer, share * chosen, active)
