"""A layer that is called several times in one step adds the losses of each call."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import layers
from tests.contract import D, tokens
from tests.helpers import some_everywhere


@keras.saving.register_keras_serializable(package="keras_moe_tests")
class Wrapped(keras.layers.Layer):
    """A layer around a mixture, which is called twice as a whole."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mixture = mixture()

    def build(self, input_shape):
        self.mixture.build(input_shape)

    def call(self, x):
        return self.mixture(x)


def mixture():
    return layers.MoE(4, 8, balance_weight=1.0, z_loss_weight=0.1, seed=1, name="mixture")


def twice(layer, inputs):
    return layer(layer(inputs))


def in_a_model(layer, inputs):
    inner = keras.Input(inputs.shape[1:])
    return twice(keras.Model(inner, layer(inner)), inputs)


CALLS = {
    "a layer": (mixture, twice),
    "a layer around it": (Wrapped, twice),
    "a model around it": (mixture, in_a_model),
    "every step": (mixture, lambda layer, x: keras.layers.TimeDistributed(layer)(x)),
    "once": (mixture, lambda layer, x: layer(x)),
}
COUNTS = {"every step": 5, "once": 1}


def model_of(name):
    make, call = CALLS[name]
    inputs = keras.Input((5, D))
    model = keras.Model(inputs, call(make(), inputs))
    rng = np.random.default_rng(3)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    return model


@pytest.mark.parametrize(
    "name",
    some_everywhere(
        list(CALLS),
        ["a layer", "a layer around it", "every step"],
        "Keras collects the losses of a model as those of a layer around",
    ),
)
def test_the_losses_of_all_calls_are_in_the_loss_of_fit(name):
    x = tokens(4)
    model = model_of(name)
    zero = keras.losses.MeanSquaredError()
    model.compile(keras.optimizers.SGD(0.0), lambda y, p: 0.0 * zero(y, p))
    model(x, training=True)
    losses = [float(ops.convert_to_numpy(loss)) for loss in model.losses]
    assert len(losses) == 2 * COUNTS.get(name, 2)
    assert len(set(losses)) == len(losses)
    for _ in range(2):
        found = model.train_on_batch(x, ops.convert_to_numpy(model(x)))
        np.testing.assert_allclose(found, sum(losses), rtol=1e-5)
