"""Any Keras layer as an expert, through every dispatcher."""

import keras
import numpy as np
import pytest

from keras_moe import layers
from keras_moe.dispatch import PaddedBlocksDispatcher
from tests.contract import arrays, run
from tests.helpers import some_everywhere

D = 6


def network(units=D, dropout=0.0):
    return keras.Sequential(
        [
            keras.layers.Dense(8, activation="tanh"),
            keras.layers.Dropout(dropout),
            keras.layers.Dense(units),
        ]
    )


def tokens(count=21, seed=0):
    return np.random.default_rng(seed).normal(size=(count, D)).astype("float32")


DISPATCHERS = {
    "walk": {"dispatch": PaddedBlocksDispatcher(4)},
    "capacity": {"capacity_factor": 3.0},
    "dense": {"dispatch": "dense"},
}
dispatchers = pytest.mark.parametrize("arguments", DISPATCHERS.values(), ids=DISPATCHERS.keys())


@dispatchers
def test_equals_the_plain_sum_over_chosen_experts(arguments):
    """Different kinds of networks side by side, each called by hand on the tokens it got."""
    experts = [network(), keras.layers.Dense(D, activation="relu"), network()]
    layer, x = layers.MoE(3, experts=experts, **arguments), tokens()
    outputs, routing = run(layer, x, return_routing=True)
    outputs, chosen, weights = arrays((outputs, routing.experts, routing.weights))
    by_hand = np.stack([arrays(expert(x))[0] for expert in experts])
    expected = sum(
        weights[:, [j]] * by_hand[chosen[:, j], np.arange(len(x))] for j in range(chosen.shape[1])
    )
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    assert len(np.unique(chosen)) == 3


@dispatchers
def test_fit_trains_every_expert(arguments):
    layer, x = layers.MoE(3, experts=network(), **arguments), tokens(48)
    inputs = keras.Input((D,))
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(0.5), "mse")
    before = [arrays(v.value)[0].copy() for v in layer.trainable_variables]
    losses = model.fit(x, np.sin(x), epochs=8, batch_size=16, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
    after = [arrays(v.value)[0] for v in layer.trainable_variables]
    assert len(before) == 3 * 4 + 1
    assert all(np.abs(b - a).max() > 1e-6 for a, b in zip(after, before, strict=True))


@dispatchers
def test_dropout_is_on_in_training_only(arguments):
    layer, x = layers.MoE(3, experts=network(dropout=0.5), **arguments), tokens()
    evaluated = [arrays(run(layer, x, training=False))[0] for _ in range(2)]
    trained = [arrays(run(layer, x, training=True))[0] for _ in range(2)]
    np.testing.assert_array_equal(*evaluated)
    assert np.abs(trained[0] - evaluated[0]).max() > 1e-3
    assert np.abs(trained[0] - trained[1]).max() > 1e-3, "the same mask at every step"


def test_blocks_of_one_expert_get_masks_of_their_own():
    """Equal tokens in different blocks of the only expert that is used."""
    experts = keras.Sequential([keras.layers.Dropout(0.5)])
    layer = layers.MoE(2, experts=experts, top_k=1, dispatch=PaddedBlocksDispatcher(4))
    x = np.ones((8, D), "float32")
    dropped = arrays(run(layer, x, training=True))[0] == 0
    assert dropped.any()
    assert (dropped[:4] != dropped[4:]).any()


class Draws(keras.layers.Layer):
    """Gives each row numbers that were drawn one column after the other."""

    def __init__(self, count=70, **kwargs):
        super().__init__(**kwargs)
        self.count, self.generator = count, keras.random.SeedGenerator(7)

    def call(self, inputs):
        shape = (keras.ops.shape(inputs)[0], 1)
        draws = [keras.random.uniform(shape, seed=self.generator) for _ in range(self.count)]
        return keras.ops.concatenate(draws, axis=-1) + 0.0 * inputs[:, :1]

    def compute_output_shape(self, input_shape):
        return (*input_shape[:-1], self.count)


@pytest.mark.parametrize(
    "training",
    some_everywhere({"True": True, "False": False}, ["True"], "an expert that always draws"),
)
def test_no_number_is_drawn_twice(training):
    """However often an expert draws, in one call and the next."""
    layer = layers.MoE(2, experts=[Draws(), Draws()], top_k=1, dispatch=PaddedBlocksDispatcher(4))
    x = np.ones((12, D), "float32")  # three blocks of one expert
    drawn = np.stack([arrays(run(layer, x, training=training))[0] for _ in range(3)])
    assert len(np.unique(drawn)) > 0.99 * drawn.size  # a few of them meet by chance


def test_copies_start_different_even_with_a_seed():
    seeded = keras.layers.Dense(D, kernel_initializer=keras.initializers.GlorotUniform(seed=3))
    layer = layers.MoE(3, experts=seeded)
    layer.build((None, D))
    kernels = [arrays(expert.kernel.value)[0] for expert in layer.experts.experts]
    assert all(np.abs(kernels[0] - other).max() > 0.1 for other in kernels[1:])


def test_output_shapes_must_agree():
    layer = layers.MoE(2, experts=[keras.layers.Dense(3), keras.layers.Dense(4)])
    with pytest.raises(ValueError, match=r"one output shape\. Received: shapes="):
        layer(keras.Input((D,)))


def test_output_width_is_the_experts():
    layer = layers.SoftMoE(3, experts=network(units=4))
    assert tuple(layer(keras.Input((None, D))).shape) == (None, None, 4)
    assert arrays(layer(np.ones((2, 5, D), "float32")))[0].shape == (2, 5, 4)


def test_mixed_precision_reaches_the_experts():
    keras.config.set_dtype_policy("mixed_bfloat16")
    layer = layers.MoE(3, experts=keras.layers.Dense(D))
    outputs = layer(np.ones((5, D), "float32"))
    assert keras.backend.standardize_dtype(outputs.dtype) == "bfloat16"
    assert all(v.dtype == "float32" for v in layer.trainable_variables)


@dispatchers
def test_a_layer_without_a_gradient_at_zero_keeps_finite_gradients(arguments):
    """Empty slots must not hold zero rows: zero times the NaN slope of a norm is NaN."""
    experts = keras.Sequential([keras.layers.Dense(D), keras.layers.UnitNormalization()])
    layer = layers.MoE(3, experts=experts, **arguments)
    inputs = keras.Input((D,))
    model = keras.Model(inputs, layer(inputs))
    model.compile("sgd", "mse")
    x = tokens()
    model.fit(x, x, batch_size=21, verbose=0)
    assert all(np.isfinite(arrays(v.value)[0]).all() for v in layer.trainable_variables)


class Residual(keras.layers.Layer):
    """A custom layer of the usual kind: sublayers and `call`, no `build`, no output shape."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = keras.layers.Dense(8, activation="relu")
        self.out = keras.layers.Dense(D)

    def call(self, inputs):
        return inputs + self.out(self.hidden(inputs))


@dispatchers
def test_a_custom_layer_with_call_only(arguments):
    layer = layers.MoE(3, experts=[Residual() for _ in range(3)], **arguments)
    assert tuple(layer(keras.Input((5, D))).shape) == (None, 5, D)
    assert len(layer.trainable_variables) == 3 * 4 + 1
    assert np.isfinite(arrays(run(layer, tokens()))[0]).all()


def test_an_expert_belongs_to_one_layer():
    experts = [keras.layers.Dense(D) for _ in range(2)]
    layers.MoE(2, experts=experts)
    with pytest.raises(ValueError, match="one layer only"):
        layers.MoE(2, experts=experts)


def test_a_mixture_is_one_expert_of_a_mixture():
    """Also where it happens to have as many experts as the layer around it."""
    inner = layers.MoE(2, 4, top_k=1)
    layer = layers.MoE(2, experts=[inner, keras.layers.Dense(D)], top_k=1)
    copied = layers.MoE(2, experts=layers.MoE(2, 4, top_k=1), top_k=1)
    x = tokens()
    outputs, routing = run(layer, x, return_routing=True)
    outputs, chosen, weights = arrays((outputs, routing.experts, routing.weights))
    to_inner = chosen[:, 0] == 0
    assert 0 < to_inner.sum() < len(x)
    expected = (weights * arrays(inner(x))[0])[to_inner]
    np.testing.assert_allclose(outputs[to_inner], expected, rtol=1e-5, atol=1e-6)
    copied.build((None, D))
    nested = [e for e in copied.experts._flatten_layers() if isinstance(e, layers.MoE)]
    assert len(nested) == 2
