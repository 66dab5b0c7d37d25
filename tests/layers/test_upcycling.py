"""`copy_weights`: every expert starts as the dense layer that was trained."""

import keras
import numpy as np
import pytest

from keras_moe import layers
from tests.contract import arrays, run
from tests.helpers import some_everywhere

D = 6
X = np.random.default_rng(0).normal(size=(21, D)).astype("float32")


@keras.saving.register_keras_serializable(package="keras_moe_tests")
class Residual(keras.layers.Layer):
    """A custom layer of the usual kind: sublayers and `call`, no `build`."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.out = keras.layers.Dense(D, "tanh")

    def call(self, inputs):
        return inputs + self.out(inputs)


def functional():
    inputs = keras.Input((D,))
    return keras.Model(inputs, keras.layers.Dense(D)(keras.layers.Dense(8, "tanh")(inputs)))


DENSE = {
    "dense": lambda: keras.layers.Dense(D, "tanh"),
    "sequential": lambda: keras.Sequential(
        [keras.layers.Dense(8, "relu"), keras.layers.Dropout(0.5), keras.layers.Dense(D)]
    ),
    "functional": functional,
    "custom": Residual,
    "norm": lambda: keras.Sequential(
        [keras.layers.LayerNormalization(), keras.layers.Dense(D, "gelu")]
    ),
    "frozen": lambda: keras.layers.Dense(D, trainable=False),
}
MIXTURES = {
    "moe": lambda bank: layers.MoE(4, experts=bank, top_k=2),
    "capacity": lambda bank: layers.MoE(4, experts=bank, capacity_factor=4.0),
    "soft_gate": lambda bank: layers.MoE(4, experts=bank, router="dense"),
}


def trained(make):
    dense = make()
    dense(X)
    dense.set_weights([w + 0.1 for w in dense.get_weights()])
    return dense


@pytest.mark.parametrize(
    "mixture",
    some_everywhere(MIXTURES, ["moe", "soft_gate"], "the experts' slots, as in other tests"),
)
@pytest.mark.parametrize("make", DENSE.values(), ids=DENSE.keys())
def test_equals_the_dense_layer_at_the_start(make, mixture):
    """Equal experts, whose weights sum to 1."""
    dense = trained(make)
    layer = mixture(layers.LayerExperts(dense, 4, copy_weights=True))
    np.testing.assert_allclose(arrays(run(layer, X))[0], arrays(dense(X))[0], rtol=1e-5, atol=1e-5)
    for expert in layer.experts.experts:
        assert not {id(w) for w in expert.weights} & {id(w) for w in dense.weights}


def test_experts_part_in_training_and_leave_the_dense_layer_alone():
    dense = trained(DENSE["dense"])
    before = dense.get_weights()
    layer = layers.MoE(4, experts=layers.LayerExperts(dense, 4, copy_weights=True), top_k=1)
    inputs = keras.Input((D,))
    model = keras.Model(inputs, layer(inputs))
    model.compile("sgd", "mse")
    model.fit(X, np.sin(X), epochs=2, verbose=0)
    kernels = [arrays(expert.kernel.value)[0] for expert in layer.experts.experts]
    assert any(np.abs(kernels[0] - other).max() > 1e-5 for other in kernels[1:])
    for now, then in zip(dense.get_weights(), before, strict=True):
        np.testing.assert_array_equal(now, then)


@pytest.mark.parametrize(
    "make",
    some_everywhere(
        {name: DENSE[name] for name in ("dense", "sequential")},
        ["sequential"],
        "one layer is a `Sequential` of one",
    ),
)
def test_a_model_that_first_builds_in_fit_starts_from_the_weights(make):
    dense = trained(make)
    bank = layers.LayerExperts(dense, 4, copy_weights=True)
    model = keras.Sequential([layers.MoE(4, experts=bank)])
    model.compile(keras.optimizers.SGD(0.0), "mse")
    model.fit(X, X, verbose=0)
    expected = arrays(dense(X, training=False))[0]
    np.testing.assert_allclose(model.predict(X, verbose=0), expected, rtol=1e-5, atol=1e-5)


def test_a_file_keeps_the_weights_and_needs_no_dense_layer(tmp_path):
    dense = trained(DENSE["sequential"])
    inputs = keras.Input((D,))
    layer = layers.MoE(4, experts=layers.LayerExperts(dense, 4, copy_weights=True))
    model = keras.Model(inputs, layer(inputs))
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    expected = model.predict(X, verbose=0)
    np.testing.assert_allclose(loaded.predict(X, verbose=0), expected, rtol=1e-6, atol=1e-6)
    model.save_weights(tmp_path / "model.weights.h5")
    inputs = keras.Input((D,))
    other = keras.Model(inputs, layers.MoE(4, experts=DENSE["sequential"]())(inputs))
    other.load_weights(tmp_path / "model.weights.h5")
    np.testing.assert_allclose(other.predict(X, verbose=0), expected, rtol=1e-6, atol=1e-6)


def test_copies_draw_masks_of_their_own():
    dense = keras.Sequential([keras.layers.Dropout(0.5, seed=3)])
    dense(X)
    bank = layers.LayerExperts(dense, 2, copy_weights=True)
    outputs = arrays(bank(np.ones((1, 8, D), "float32"), training=True))[0]
    assert (outputs[0] != outputs[1]).any()


def test_without_it_copies_start_at_random():
    dense = trained(DENSE["dense"])
    layer = layers.MoE(4, experts=dense)
    layer.build((None, D))
    for expert in layer.experts.experts:
        assert np.abs(arrays(expert.kernel.value)[0] - dense.get_weights()[0]).max() > 1e-2


@pytest.mark.parametrize(
    "experts", [keras.layers.Dense(D), [keras.layers.Dense(D), keras.layers.Dense(D)]]
)
def test_there_must_be_weights_to_copy(experts):
    message = r"needs `experts` to be one layer that is built, by `build.*Received: experts="
    with pytest.raises(ValueError, match=message):
        layers.LayerExperts(experts, 2, copy_weights=True)


@pytest.mark.parametrize("is_given", [False, True])
def test_a_sequential_that_was_called_on_sequences_is_taken(is_given):
    """As a block of a Transformer calls it, on `(batch, tokens, d)`."""
    inner = [keras.layers.Dense(8, "relu"), keras.layers.Dense(D)]
    ffn = keras.Sequential([*([keras.Input((7, D))] if is_given else []), *inner])
    x = X.reshape(3, 7, D)
    expected = keras.ops.convert_to_numpy(ffn(x))
    layer = layers.MoE(4, experts=layers.LayerExperts(ffn, 4, copy_weights=True))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(layer(x)), expected, rtol=1e-4, atol=1e-5)


def test_a_model_of_sequences_is_refused_by_what_to_do():
    inputs = keras.Input((7, D))
    model = keras.Model(inputs, keras.layers.Dense(D)(inputs))
    with pytest.raises(ValueError, match=r"must take rows `\(rows, d\)`.*`keras\.Input\(\(6,\)\)`"):
        layers.LayerExperts(model, 4, copy_weights=True)
