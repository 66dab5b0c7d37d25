"""A causal `SoftMoE` is the plain one on every prefix of the sequence."""

import keras
import numpy as np
import pytest

from keras_moe import layers
from tests.contract import arrays, run
from tests.helpers import some_everywhere

ops = keras.ops


MIXINGS = ["soft", "soft_uniform", "uniform_soft", "uniform"]
PREFIXES = {
    f"{'padded' if has_padding else 'whole'}-{mixing}": (has_padding, mixing)
    for has_padding in (False, True)
    for mixing in MIXINGS
}
# Padding and each kind of mixing.
EVERYWHERE = ["whole-soft", *(f"padded-{mixing}" for mixing in MIXINGS)]


@pytest.mark.parametrize(
    ("has_padding", "mixing"),
    some_everywhere(PREFIXES, EVERYWHERE, "what is there with padding, without it"),
)
def test_equals_the_plain_layer_on_every_prefix(has_padding, mixing):
    x = np.random.default_rng(0).normal(size=(2, 5, 6)).astype("float32")
    mask = np.array([[1, 0, 1, 1, 0], [0, 1, 1, 1, 1]], "bool") if has_padding else None
    causal = layers.SoftMoE(3, 8, slots_per_expert=2, causal=True, mixing=mixing)
    plain = layers.SoftMoE(3, 8, slots_per_expert=2, mixing=mixing)
    for layer in (causal, plain):
        layer.build(x.shape)
    plain.set_weights(causal.get_weights())

    def call(layer, length):
        part = None if mask is None else mask[:, :length]
        return arrays(run(layer, x[:, :length], part))[0]

    whole = call(causal, 5)
    for length in range(1, 6):
        expected = call(plain, length)[:, -1]
        np.testing.assert_allclose(whole[:, length - 1], expected, rtol=1e-5, atol=1e-6)


def test_no_token_sees_the_future():
    x = np.random.default_rng(0).normal(size=(2, 6, 6)).astype("float32")
    layer = layers.SoftMoE(3, 8, causal=True)
    before = ops.convert_to_numpy(layer(x))
    changed = x.copy()
    changed[:, 3:] += 1.0
    after = ops.convert_to_numpy(layer(changed))
    np.testing.assert_array_equal(before[:, :3], after[:, :3])
    assert (np.abs(before[:, 3:] - after[:, 3:]) > 1e-4).any(axis=-1).all()


def test_routing_record():
    layer = layers.SoftMoE(3, 8, slots_per_expert=2, causal=True)
    _, routing = layer(np.ones((2, 4, 6), "float32"), return_routing=True)
    dispatch = ops.convert_to_numpy(routing.dispatch)
    assert dispatch.shape == (2, 4, 4, 3, 2)
    np.testing.assert_allclose(dispatch.sum(axis=2), 1.0, rtol=1e-6)
    assert not dispatch[:, ~np.tri(4, dtype=bool)].any()
