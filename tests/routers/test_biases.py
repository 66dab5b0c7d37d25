"""A bias of a router or gate is a kernel's row for a feature that is always 1."""

import keras
import numpy as np
import pytest

from keras_moe import layers, routers
from tests import helpers
from tests.oracle import losses

N, D, E = 9, 3, 6
RULES = {
    "top_k": lambda **more: routers.TopKRouter(E, 2, **more),
    "sigmoid": lambda **more: routers.TopKRouter(E, 2, score="sigmoid", **more),
    "switch": lambda **more: routers.SwitchRouter(E, jitter=0.0, **more),
    "noisy_top_k": lambda **more: routers.NoisyTopKRouter(E, 2, seed=1, **more),
    "batch_priority": lambda **more: routers.BatchPriorityRouter(E, 2, seed=1, **more),
    "no_token_left": lambda **more: routers.NoTokenLeftRouter(E, 2, capacity_factor=0.7, **more),
    "sigmoid_bias": lambda **more: routers.SigmoidBiasRouter(E, 2, **more),
    "sinkhorn": lambda **more: routers.SinkhornRouter(E, **more),
    "expert_choice": lambda **more: routers.ExpertChoiceRouter(E, 2, **more),
    "relu": lambda **more: routers.ReLURouter(E, 2, **more),
    "dselect_k": lambda **more: routers.DSelectKRouter(E, 2, gamma=4.0, **more),
    "dense": lambda **more: routers.DenseRouter(E, **more),
}
BIASES = {"logit_bias": "kernel", "codes_bias": "codes", "alpha_bias": "alpha", "bias": "kernel"}


def with_a_row(weights):
    """The weights of a layer without biases that reads one feature more."""
    at = {name: value for name, value in weights.items() if not name.endswith("bias")}
    for name, value in at.items():
        row = [
            weights[bias] for bias, kernel in BIASES.items() if kernel == name and bias in weights
        ]
        row = row[0] if row else np.zeros(value.shape[:-2] + value.shape[-1:])
        at[name] = np.concatenate([value, row[..., None, :]], axis=-2).astype("float32")
    return at


def compare(make, weights_of_result, training=None):
    """Values and gradients of both."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(N, D)).astype("float32")
    wide = np.concatenate([x, np.ones((N, 1), "float32")], axis=-1)
    biased, plain = make(use_bias=True), make()
    biased.build((None, D))
    plain.build((None, D + 1))
    helpers.randomize_weights(biased)
    weights = helpers.weights_of(biased)
    assert any(name.endswith("bias") for name in weights)
    helpers.set_weights(plain, with_a_row(weights))
    more = {} if training is None else {"training": training}
    shape = helpers.call(plain, wide, **more)[0]
    cotangent = rng.normal(size=weights_of_result(shape).shape).astype("float32")
    plain_again = make()
    plain_again.build((None, D + 1))
    helpers.set_weights(plain_again, with_a_row(weights))
    found, _, gradients = helpers.values_and_gradients(
        biased, x, cotangent, weights_of_result, **more
    )
    expected, _, slopes = helpers.values_and_gradients(
        plain_again, wide, cotangent, weights_of_result, **more
    )
    for one, other in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
        helpers.assert_close(one, other, "a part of the record")
    slopes["inputs"] = slopes["inputs"][:, :D]
    for bias, kernel in BIASES.items():
        if bias in gradients:
            slopes[bias] = slopes[kernel][..., -1, :]
    for name, slope in slopes.items():
        if name != "inputs" and not name.endswith("bias"):
            slopes[name] = slope[..., :-1, :]
    helpers.assert_all_close(gradients, slopes)
    return biased


@pytest.mark.one_backend("a sum in one place, which other tests have on every backend")
@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", RULES)
def test_of_routers(name, training):
    router = compare(RULES[name], lambda routing: routing.weights, training)
    again = type(router).from_config(router.get_config())
    assert again.use_bias
    assert not RULES[name]().use_bias


def test_of_gates():
    compare(lambda **more: routers.SoftmaxGate(E, 2, **more), lambda routing: routing.weights)


def test_gpt_oss():
    """Experts are the k largest x W + b, weights the softmax of these k."""
    layer = layers.MoE(E, 5, router=routers.TopKRouter(E, 2, use_bias=True))
    layer.build((None, D))
    helpers.randomize_weights(layer)
    assert "router/logit_bias" in helpers.weights_of(layer)
    x = np.random.default_rng(0).normal(size=(N, D)).astype("float32")
    (_, routing), _ = helpers.call(layer, x, return_routing=True)
    weights = helpers.weights_of(layer)
    for n, row in enumerate(x.astype("float64") @ weights["router/kernel"]):
        logits = row + weights["router/logit_bias"]
        best = np.argsort(-logits)[:2]
        np.testing.assert_array_equal(routing.experts[n], best)
        helpers.assert_close(routing.weights[n], losses.softmax(logits[best]), "weights")


def test_a_trained_bias_and_a_selection_bias():
    """Two weights of one router, the second of which weighs nothing."""
    layer = layers.MoE(E, 5, router=routers.SigmoidBiasRouter(E, 2, use_bias=True))
    layer.build((None, D))
    paths = {helpers.path_of(layer, v): v.trainable for v in layer.router.weights}
    assert paths == {"router/kernel": True, "router/logit_bias": True, "router/bias": False}


def test_codes_of_dselect_k_are_the_authors():
    """`np.binary_repr(expert, width=bits)`, whose first bit is the highest."""
    router = routers.DSelectKRouter(8, 1, static=True)
    router.build((None, D))
    for expert in range(8):
        bits = [int(bit) for bit in np.binary_repr(expert, width=3)]
        router.codes.assign(np.where(bits, 1.0, -1.0))
        routing, _ = helpers.call(router, np.ones((2, D), "float32"))
        np.testing.assert_array_equal(routing.weights, np.eye(8)[[expert] * 2])


@pytest.mark.one_backend("checks of Python")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: routers.DSelectKRouter(E, static=True, use_bias=True),
            "`use_bias` must be False where `static` is set",
        ),
        (lambda: routers.HashRouter(E, use_bias=True), "`HashRouter` has no use for `use_bias`"),
        (lambda: routers.UniformRouter(E, use_bias=True), "has no use for `use_bias`"),
        (
            lambda: layers.MMoE(E, 4, 2, gate=routers.SoftmaxGate(E, 2), gate_use_bias=True),
            "`gate_use_bias` must be False where `gate` is an object",
        ),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
