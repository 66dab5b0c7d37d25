"""What each dispatcher can be differentiated for: the table in docs/dispatch.md.

All is compared with "dense", whose operations the backend differentiates itself.
"""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import layers
from tests.contract import D

BACKEND = keras.backend.backend()
N, E = 24, 4
NATIVE = pytest.mark.one_backend("operations of Keras, which every backend differentiates itself")
EXPERTS = {
    "mlp": {"experts": "mlp", "hidden_dim": 8},
    "glu": {"experts": "glu", "hidden_dim": 8, "activation": "silu"},
    "one activated layer": {"experts": "bank"},
}
rng = np.random.default_rng(0)
X = rng.normal(size=(N, D)).astype("float32")
V = rng.normal(size=(N, D)).astype("float32")


def layer_of(dispatch, capacity_factor, experts="mlp"):
    arguments = dict(EXPERTS[experts])
    if arguments["experts"] == "bank":
        arguments["experts"] = layers.ExpertMLP(E, D, "tanh", activate_last=True)
    layer = layers.MoE(E, top_k=2, dispatch=dispatch, capacity_factor=capacity_factor, **arguments)
    layer.build((None, D))
    numbers = np.random.default_rng(1)
    for variable in layer.trainable_variables:
        variable.assign(0.7 * numbers.normal(size=variable.shape).astype("float32"))
    return layer


def penalty(layer, jit_compile=None):
    """The derivative by x, and by the weights, of <v, d loss / dx>, where loss = sum(y^2)."""
    if BACKEND == "jax":
        import jax

        kept = [v.value for v in layer.non_trainable_variables]

        def loss(weights, x):
            outputs, _ = layer.stateless_call(weights, kept, x)
            return (outputs**2).sum()

        def product(weights, x):
            return (jax.grad(loss, 1)(weights, x) * V).sum()

        weights = [v.value for v in layer.trainable_variables]
        by_weights, by_x = jax.jit(jax.grad(product, (0, 1)))(weights, ops.convert_to_tensor(X))
        return [np.asarray(each) for each in [by_x, *by_weights]]
    if BACKEND == "torch":
        import torch

        x = torch.tensor(X, requires_grad=True)
        weights = [v.value for v in layer.trainable_variables]
        (first,) = torch.autograd.grad((layer(x) ** 2).sum(), x, create_graph=True)
        second = torch.autograd.grad((first * torch.tensor(V)).sum(), [x, *weights])
        return [each.numpy() for each in second]
    import tensorflow as tf

    x = tf.constant(X)
    weights = [v.value for v in layer.trainable_variables]

    @tf.function(jit_compile=jit_compile)
    def second():
        with tf.GradientTape() as outer:
            outer.watch(x)
            with tf.GradientTape() as inner:
                inner.watch(x)
                loss = tf.reduce_sum(layer(x) ** 2)
            product = tf.reduce_sum(inner.gradient(loss, x) * V)
        return outer.gradient(product, [x, *weights])

    return [each.numpy() for each in second()]


def assert_alike(found, expected):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * max(np.abs(b).max(), 1e-3))


@pytest.mark.parametrize(
    ("dispatch", "capacity_factor", "experts"),
    [
        ("walk", None, "mlp"),
        ("walk", 1.0, "glu"),
        ("walk", None, "one activated layer"),
        ("padded_blocks", None, "mlp"),
        ("slots", 1.0, "mlp"),
        pytest.param("auto", None, "mlp", marks=NATIVE),
        pytest.param("auto", 1.0, "mlp", marks=NATIVE),
        pytest.param("lookup", None, "mlp", marks=NATIVE),
        pytest.param("einsum", 1.0, "mlp", marks=NATIVE),
    ],
)
def test_gradients_of_gradients(dispatch, capacity_factor, experts):
    expected = penalty(layer_of("dense", capacity_factor, experts))
    assert all(np.abs(each).max() > 1e-3 for each in expected[:2])
    assert_alike(penalty(layer_of(dispatch, capacity_factor, experts)), expected)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="JAX always takes XLA, PyTorch never does")
def test_gradients_of_gradients_under_xla():
    expected = penalty(layer_of("dense", 1.0))
    assert_alike(penalty(layer_of("walk", 1.0), jit_compile=True), expected)


def function_of(layer):
    """The layer as a function of tokens, for the backend's transforms."""
    if BACKEND != "jax":
        return layer
    weights = [v.value for v in layer.trainable_variables]
    kept = [v.value for v in layer.non_trainable_variables]
    return lambda x: layer.stateless_call(weights, kept, x)[0]


def jvp(layer):
    """The derivative of the outputs along V."""
    x, v, function = ops.convert_to_tensor(X), ops.convert_to_tensor(V), function_of(layer)
    if BACKEND == "jax":
        import jax

        return jax.jvp(function, (x,), (v,))[1]
    if BACKEND == "torch":
        import torch

        return torch.func.jvp(function, (x,), (v,))[1]
    import tensorflow as tf

    with tf.autodiff.ForwardAccumulator(x, v) as accumulator:
        outputs = function(x)
    return accumulator.jvp(outputs)


def jacobian(layer):
    """All derivatives of the outputs, by reverse mode."""
    x, function = ops.convert_to_tensor(X), function_of(layer)
    if BACKEND == "jax":
        import jax

        return jax.jit(jax.jacrev(function))(x)
    if BACKEND == "torch":
        import torch

        return torch.func.jacrev(function)(x)
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(x)
        outputs = function(x)
    return tape.jacobian(outputs, x)


def mapped(layer):
    """The outputs of two batches, mapped over."""
    both, function = ops.stack([X, X + V]), function_of(layer)
    if BACKEND == "jax":
        import jax

        return jax.jit(jax.vmap(function))(both)
    if BACKEND == "torch":
        import torch

        return torch.func.vmap(function)(both)
    import tensorflow as tf

    return tf.vectorized_map(function, both)


TRANSFORMS = {"jvp": jvp, "jacobian": jacobian, "vmap": mapped}
REFUSED = {
    ("jax", "jvp", "walk"): (TypeError, "needs `dispatch='dense'`"),
    ("jax", "jvp", "padded_blocks"): (TypeError, "needs `dispatch='dense'`"),
    ("jax", "jvp", "slots"): (TypeError, "needs `dispatch='dense'`"),
    ("torch", "vmap", "walk"): (ValueError, "Use `dispatch='dense'`"),
}


# PyTorch says of its own transforms that they could be faster.
@pytest.mark.filterwarnings(
    "ignore:There is a performance drop",
    "ignore:torch.searchsorted.*non-contiguous",
    "ignore:`torch.jit.script` is deprecated",
)
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize(
    ("dispatch", "capacity_factor"),
    [
        ("walk", None),
        ("padded_blocks", None),
        pytest.param("walk", 1.0, marks=NATIVE),
        pytest.param("slots", 1.0, marks=NATIVE),
        pytest.param("einsum", 1.0, marks=NATIVE),
        pytest.param("lookup", None, marks=NATIVE),
    ],
)
def test_other_transforms(transform, dispatch, capacity_factor):
    layer, apply = layer_of(dispatch, capacity_factor), TRANSFORMS[transform]
    if (BACKEND, transform, dispatch) in REFUSED:
        error, words = REFUSED[BACKEND, transform, dispatch]
        with pytest.raises(error, match=words):
            apply(layer)
        return
    found, expected = apply(layer), apply(layer_of("dense", capacity_factor))
    assert_alike([ops.convert_to_numpy(found)], [ops.convert_to_numpy(expected)])


def test_a_function_that_is_not_compiled_is_differentiated_at_an_array():
    """JAX hands NumPy's arrays on to the gradient, which indexes them."""
    if BACKEND != "jax":
        pytest.skip("only JAX differentiates at an array of NumPy's")
    import jax

    layer = layer_of("walk", None)
    function = function_of(layer)
    found = jax.grad(lambda x: (function(x) ** 2).sum())(X)
    expected = jax.grad(lambda x: (function_of(layer_of("dense", None))(x) ** 2).sum())(X)
    assert_alike([np.asarray(found)], [np.asarray(expected)])
