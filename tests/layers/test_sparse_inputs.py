"""Sparse tensors as inputs, where a backend has them: the values of dense ones."""

import keras
import numpy as np
import pytest

from keras_moe import layers, routers
from tests import helpers
from tests.contract import arrays

pytestmark = pytest.mark.skipif(
    keras.backend.backend() not in ("tensorflow", "jax"), reason="Keras has no sparse tensors here"
)
D = 8
LAYERS = {
    "moe": lambda: layers.MoE(4, 8),
    "capacity": lambda: layers.MoE(4, 8, capacity_factor=1.0),
    "example": lambda: layers.MoE(4, 8, routing_level="example"),
    "keras": lambda: layers.MoE(4, experts=keras.layers.Dense(D)),
    "switch": lambda: layers.SwitchFFN(4, 8),
    "soft": lambda: layers.SoftMoE(4, 8),
    "mmoe": lambda: layers.MMoE(4, [8], 2),
    "gate_units": lambda: layers.MMoE(4, [8], 2, gate_units=[4]),
}
ALONE = {
    "router": lambda: routers.TopKRouter(4),
    "hash": lambda: routers.HashRouter(4),
    "noisy": lambda: routers.NoisyTopKRouter(4),
    "dselect_k": lambda: routers.DSelectKRouter(4),
    "gate": lambda: routers.SoftmaxGate(4, 2),
}


def data(dtype="float32", shape=(6, D)):
    rng = np.random.default_rng(0)
    return (rng.integers(1, 5, shape) * (rng.random(shape) < 0.3)).astype(dtype)


def sparse(x):
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        return tf.sparse.from_dense(x)
    from jax.experimental import sparse as jax_sparse

    return jax_sparse.BCOO.fromdense(x, n_batch=0, nse=int(x.size))


@pytest.mark.parametrize("make", [*LAYERS.values(), *ALONE.values()], ids=[*LAYERS, *ALONE])
def test_equals_the_dense_input(make):
    layer, x = make(), data()
    found = arrays(layer(sparse(x)))
    expected, _ = helpers.call(layer, x)
    for a, b in zip(found, keras.tree.flatten(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


# Each kind of layer: `test_equals_the_dense_input` has all.
DTYPES = [("moe", "int32"), ("moe", "bool")]
DTYPES += [(name, "float32") for name in ("keras", "switch", "soft", "gate_units")]


@pytest.mark.parametrize(("name", "dtype"), DTYPES)
def test_a_model_with_a_sparse_input(name, dtype):
    inputs = keras.Input((D,), sparse=True, dtype=dtype)
    outputs = keras.tree.flatten(LAYERS[name]()(inputs))
    assert not any(output.sparse for output in outputs)
    model = keras.Model(inputs, outputs)
    model.compile("sgd", ["mse"] * len(outputs))
    x = data(dtype)
    target = [np.ones((6, 8), "float32")] * len(outputs)
    model.fit(sparse(x), target, verbose=0, batch_size=6)
    model.evaluate(sparse(x), target, verbose=0, batch_size=6)
    predicted = keras.tree.flatten(model.predict(sparse(x), verbose=0, batch_size=6))
    for a, b in zip(predicted, keras.tree.flatten(model(x)), strict=True):
        np.testing.assert_allclose(a, keras.ops.convert_to_numpy(b), rtol=1e-5, atol=1e-5)


def test_scipy_matrices():
    scipy_sparse = pytest.importorskip("scipy.sparse")
    inputs = keras.Input((D,), sparse=True)
    model = keras.Model(inputs, layers.MoE(4, 8)(inputs))
    model.compile("sgd", "mse")
    x = data()
    model.fit(scipy_sparse.csr_matrix(x), x, batch_size=3, verbose=0)
    predicted = model.predict(scipy_sparse.csr_matrix(x), batch_size=3, verbose=0)
    np.testing.assert_allclose(predicted, model.predict(x, verbose=0), rtol=1e-5, atol=1e-5)


def test_three_axes_and_a_mask():
    layer, x = layers.MoE(4, 8), data(shape=(2, 3, D))
    mask = np.array([[True, True, False], [True, False, False]])
    expected = keras.ops.convert_to_numpy(layer(x, mask=mask))
    outputs = keras.ops.convert_to_numpy(layer(sparse(x), mask=mask))
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
