"""A mixture in the cell of a recurrent layer: trained unrolled, else refused by a sentence."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import layers
from tests.contract import D, tokens
from tests.helpers import some_everywhere

BATCH, STEPS = 4, 3
MIXTURES = {
    "moe": lambda: layers.MoE(3, 8, seed=1),
    "bias": lambda: layers.MoE(3, 8, router="sigmoid_bias", seed=1),
    "switch": lambda: layers.SwitchFFN(3, 8, seed=1),
    "soft": lambda: layers.SoftMoE(3, 8, seed=1),
    "mmoe": lambda: layers.MMoE(3, D, tasks=1, seed=1),
}


@keras.saving.register_keras_serializable(package="keras_moe_tests")
class MixtureCell(keras.layers.Layer):
    """state = tanh(mixture(inputs + state))"""

    def __init__(self, mixture, **kwargs):
        super().__init__(**kwargs)
        self.mixture = mixture
        self.state_size = self.output_size = D

    def build(self, input_shape):
        shape = (None, D) if not isinstance(self.mixture, layers.SoftMoE) else (None, 1, D)
        self.mixture.build(shape)

    def call(self, inputs, states, training=None):
        x = inputs + states[0]
        if isinstance(self.mixture, layers.SoftMoE):
            x = ops.expand_dims(x, 1)
        x = ops.tanh(keras.tree.flatten(self.mixture(x, training=training))[0])
        x = ops.reshape(x, (-1, D))
        return x, [x]


def model_of(name, unroll):
    inputs = keras.Input((STEPS, D))
    cell = MixtureCell(MIXTURES[name]())
    outputs = keras.layers.RNN(cell, unroll=unroll)(inputs)
    model = keras.Model(inputs, outputs)
    rng = np.random.default_rng(3)
    for variable in model.trainable_variables:
        variable.assign(rng.normal(size=variable.shape))
    model.compile("sgd", "mse")
    return model, cell.mixture


every_mixture = pytest.mark.parametrize(
    "name",
    some_everywhere(
        MIXTURES.keys(), ["bias", "soft", "mmoe"], "a step of a loop is a call of the layer"
    ),
)


@every_mixture
def test_training_in_a_loop_says_to_unroll_it(name):
    model, _ = model_of(name, unroll=False)
    x = tokens(BATCH, STEPS)
    with pytest.raises(ValueError, match=r"can be trained with `unroll=True` only"):
        model.fit(x, x[:, 0], verbose=0)


@every_mixture
def test_unrolled_it_trains_and_counts_each_step_once(name):
    model, mixture = model_of(name, unroll=True)
    x = tokens(BATCH, STEPS)
    before = [ops.convert_to_numpy(v) for v in model.trainable_variables]
    model.fit(x, x[:, 0], batch_size=BATCH, verbose=0)
    assert mixture.running_counts()["decisions"] == BATCH * STEPS
    after = [ops.convert_to_numpy(v) for v in model.trainable_variables]
    assert any(np.abs(a - b).max() > 0 for a, b in zip(after, before, strict=True))


@pytest.mark.parametrize("name", ["moe", "soft"])
def test_at_inference_a_loop_gives_what_it_gives_unrolled(name):
    x = tokens(BATCH, STEPS)
    (looped, mixture), (unrolled, _) = model_of(name, False), model_of(name, True)
    expected = unrolled.predict(x, verbose=0)
    np.testing.assert_allclose(looped.predict(x, verbose=0), expected, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(
        looped.evaluate(x, expected, verbose=0), 0.0, atol=1e-6
    )  # without losses of the mixture
    assert mixture.running_counts()["decisions"] == 0
