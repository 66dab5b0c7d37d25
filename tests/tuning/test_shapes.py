"""Shapes that nothing can be counted of are refused in a sentence."""

import keras
import pytest

from keras_moe import layers
from keras_moe.flops import active_flops, count_products, layer_flops

pytestmark = pytest.mark.one_backend("arithmetic on configurations")

N, D, H, E = 6, 4, 10, 5  # tokens, model width, hidden width, experts


@pytest.mark.parametrize("shape", [5, "a", (4, -1), (4, 2.5), (4, "x"), {"x": (4, "x")}])
def test_what_is_no_shape(shape):
    layer = keras.layers.Dense(3)
    layer.build((None, D))
    with pytest.raises(ValueError, match=r"`input_shape` must be a shape, such as \(10, 16\), or"):
        active_flops(layer, shape)


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.MoE(E, H),
        lambda: keras.layers.Dense(3),
        lambda: keras.layers.TimeDistributed(keras.layers.Dense(3)),
        lambda: keras.layers.LSTM(H),
    ],
)
def test_inputs_of_unknown_size(make):
    layer = make()
    layer.build((None, N, D))
    for count in (layer_flops, count_products):
        with pytest.raises(ValueError, match=r"`inputs` must have known sizes. Received: shapes="):
            count(layer, keras.KerasTensor((None, N, D)))
