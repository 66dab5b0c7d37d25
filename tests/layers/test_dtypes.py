"""Inputs of integers and bools, as `Dense` takes them, and training in float64."""

import contextlib

import keras
import numpy as np
import pytest

from keras_moe import layers, routers
from tests import helpers
from tests.contract import D, arrays, run
from tests.helpers import some_everywhere

LAYERS = {
    "moe": lambda: layers.MoE(4, 8),
    "capacity": lambda: layers.MoE(4, 8, capacity_factor=1.0),
    "einsum": lambda: layers.MoE(4, 8, capacity_factor=1.0, dispatch="einsum"),
    "Keras layers": lambda: layers.MoE(3, experts=keras.layers.Dense(D)),
    "example level": lambda: layers.MoE(4, 8, routing_level="example"),
    "expert choice": lambda: layers.MoE(4, 8, router="expert_choice"),
    "switch": lambda: layers.SwitchFFN(3, 8),
    "soft": lambda: layers.SoftMoE(4, 8),
    "mmoe": lambda: layers.MMoE(4, D, tasks=2, gate_units=[5]),
}
PARTS = {
    "bank": (lambda: layers.ExpertMLP(4, [8, D]), (4, 9, D)),
    "Keras layers": (lambda: layers.LayerExperts(keras.layers.Dense(D), 4), (4, 9, D)),
    "router": (lambda: routers.TopKRouter(4), (9, D)),
    "soft router": (lambda: routers.SoftRouter(4), (2, 9, D)),
    "gate": (lambda: routers.SoftmaxGate(4, 2), (9, D)),
}


def numbers(shape, dtype):
    return np.random.default_rng(0).integers(0, 2 if dtype == "bool" else 9, shape).astype(dtype)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "uint8") for name in LAYERS), ("moe", "bool"), ("moe", "int32"), ("soft", "bool")],
)
# Few tokens and many go by different dispatch.
@pytest.mark.parametrize(
    "examples", some_everywhere({"2": 2, "140": 140}, ["2"], "the same cast, before any dispatch")
)
def test_integers_are_the_floats_of_their_value(name, dtype, examples):
    layer, x = LAYERS[name](), numbers((examples, 5, D), dtype)
    layer.build(x.shape)
    outputs = arrays(run(layer, x, training=False))
    expected = arrays(run(layer, x.astype("float32"), training=False))
    for a, b in zip(outputs, expected, strict=True):
        assert a.dtype == np.float32
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", ["int32", "bool"])
@pytest.mark.parametrize("name", PARTS)
def test_parts_take_integers_too(name, dtype):
    make, shape = PARTS[name]
    layer, x = make(), numbers(shape, dtype)
    layer.build(shape)
    outputs, expected = (arrays(helpers.call(layer, each)[0]) for each in (x, x.astype("float32")))
    for a, b in zip(outputs, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["moe", "switch", "soft", "mmoe"])
def test_fit_on_integers(name):
    inputs, layer = keras.Input((5, D), dtype="uint8"), LAYERS[name]()
    model = keras.Model(inputs, keras.tree.flatten(layer(inputs))[0])
    model.compile("sgd", "mse")
    x = numbers((8, 5, D), "uint8")
    assert np.isfinite(model.fit(x, x.astype("float32"), verbose=0).history["loss"]).all()
    expected = arrays(run(layer, x.astype("float32"), training=False))[0]
    np.testing.assert_allclose(model.predict_on_batch(x), expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def float64():
    """All of Keras in float64, which JAX has on request only."""
    wide = contextlib.nullcontext()
    if keras.backend.backend() == "jax":
        import jax

        wide = jax.enable_x64(True)
    keras.config.set_floatx("float64")
    with wide:
        yield
    keras.config.set_floatx("float32")


# JAX has float64 on request only, and promotes as it does there: one of each layer shows it.
FLOAT64 = [*LAYERS, "relu", "dselect_k", "noisy_top_k"]
if keras.backend.backend() == "jax":
    FLOAT64 = ["moe", "soft", "mmoe"]


def model_in_float64(name):
    layer = LAYERS[name]() if name in LAYERS else layers.MoE(4, 8, router=name)
    inputs = keras.Input((5, D))
    outputs = keras.tree.flatten(layer(inputs))
    model = keras.Model(inputs, outputs[0])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    return model, np.random.default_rng(0).normal(size=(8, 5, D))


@pytest.mark.parametrize("name", FLOAT64)
def test_fit_in_float64(name, float64):
    """An auxiliary loss in float32 cannot be added to one in float64 on TensorFlow."""
    model, x = model_in_float64(name)
    losses = model.fit(x, np.sin(x), epochs=2, verbose=0).history["loss"]
    assert np.isfinite(losses).all()
    assert model.output.dtype == "float64"


@pytest.mark.parametrize(
    "name",
    some_everywhere(
        FLOAT64, ["moe", "soft", "mmoe"], "`fit` computes and adds all that these compute"
    ),
)
def test_evaluate_and_predict_in_float64(name, float64):
    model, x = model_in_float64(name)
    assert np.isfinite(model.evaluate(x, np.sin(x), verbose=0))
    assert model.predict(x, verbose=0).dtype == np.float64
