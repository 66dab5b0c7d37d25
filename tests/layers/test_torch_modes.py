"""`torch.autocast` and `torch.utils.checkpoint` around a mixture, in loops that people write."""

import keras
import numpy as np
import pytest

from keras_moe import layers, routers
from tests import helpers

pytestmark = pytest.mark.skipif(keras.backend.backend() != "torch", reason="modes of PyTorch")

N, D, E = 512, 16, 8
RULES = {
    "top_k": lambda: routers.TopKRouter(E, 2),
    "noisy_top_k": lambda: routers.NoisyTopKRouter(E, 2, kernel_initializer="glorot_uniform"),
    "batch_priority": lambda: routers.BatchPriorityRouter(E, 2),
    "sigmoid_bias": lambda: routers.SigmoidBiasRouter(E, 2, use_bias=True),
    "sinkhorn": lambda: routers.SinkhornRouter(E),
    "relu": lambda: routers.ReLURouter(E, 2),
    "dselect_k": lambda: routers.DSelectKRouter(E, 2),
    "expert_choice": lambda: routers.ExpertChoiceRouter(E, 2),
    "no_token_left": lambda: routers.NoTokenLeftRouter(E, 2),
    "dense": lambda: routers.DenseRouter(E),
    "hash": lambda: routers.HashRouter(E, 2),
}


def tokens(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


def autocast():
    import torch

    return torch.autocast("cpu", dtype=torch.bfloat16)


def assert_same_record(found, expected):
    for one, other in zip(keras.tree.flatten(found), keras.tree.flatten(expected), strict=True):
        np.testing.assert_array_equal(
            keras.ops.convert_to_numpy(one), keras.ops.convert_to_numpy(other)
        )


@pytest.mark.parametrize("name", RULES)
def test_autocast_sends_no_token_elsewhere(name):
    router = RULES[name]()
    router.build((None, D))
    helpers.randomize_weights(router, size=0.05)
    x = tokens(N, D)
    expected = router(x, training=False)
    with autocast():
        found = router(x, training=False)
    assert_same_record(found, expected)


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        (lambda: routers.SoftmaxGate(E, 2, use_bias=True), (N, D)),
        (lambda: routers.SoftmaxGate(E, 2), (2, N, D)),
        (lambda: routers.SoftRouter(E, 2), (4, 16, D)),
    ],
)
def test_autocast_leaves_gates_as_they_are(make, shape):
    router, x = make(), tokens(*shape)
    expected = router(x)
    with autocast():
        found = router(x)
    assert_same_record(found, expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.MoE(E, 8, capacity=64, dispatch="einsum"),
        lambda: layers.MoE(E, 8, capacity=64, dispatch="slots"),
        lambda: layers.MoE(E, 8, dispatch="dense"),
        lambda: layers.MoE(E, 8, dispatch="walk"),
        lambda: layers.MMoE(E, 8, 1),
    ],
)
def test_sums_over_experts_stay_in_float32(make):
    """Experts of nothing but a bias of 1 + 2^-12, which bfloat16 does not hold: autocast casts
    inputs of products, so that only what comes after experts can lose it.
    """
    layer = make()
    layer.build((None, D))
    for variable in layer.experts.trainable_variables:
        is_last = variable.name in ("bias_1", "bias_0")
        variable.assign(np.full(variable.shape, (1.0 + 2.0**-12) * is_last, "float32"))
    x = tokens(64, D)
    expected = keras.tree.flatten(layer(x))[0]
    with autocast():
        found = keras.tree.flatten(layer(x))[0]
    np.testing.assert_allclose(found.detach().float().numpy(), expected.detach().numpy(), rtol=1e-6)


MIXTURES = {
    "moe": lambda: layers.MoE(E, 8),
    "sigmoid_bias": lambda: layers.MoE(E, 8, router="sigmoid_bias"),
    "relu": lambda: layers.MoE(E, 8, router="relu"),
    "capacity": lambda: layers.MoE(E, 8, capacity=64),
    "example level": lambda: layers.MoE(E, 8, routing_level="example"),
    "keras layers": lambda: layers.MoE(E, experts=keras.layers.Dense(D)),
    "soft": lambda: layers.SoftMoE(E, 8),
    "mmoe": lambda: layers.MMoE(E, 8, 2),
}


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("name", MIXTURES)
def test_a_checkpoint_counts_and_adapts_once(name, use_reentrant):
    import torch
    from torch.utils.checkpoint import checkpoint

    def trained(around):
        keras.utils.set_random_seed(0)
        layer = MIXTURES[name]()
        x = torch.tensor(tokens(4, 16, D), requires_grad=True)
        layer.build(x.shape)
        helpers.randomize_weights(layer)
        outputs = around(lambda x: tuple(keras.tree.flatten(layer(x, training=True))), x)
        losses = layer.losses
        sum(torch.sum(each**2) for each in outputs).backward()
        state = {v.path.split("/", 1)[1]: v.numpy() for v in layer.non_trainable_variables}
        gradients = [v.value.grad for v in layer.experts.trainable_variables]
        assert len(layer.losses) == len(losses)
        return layer.running_counts(), state, gradients, x.grad

    plain = trained(lambda call, x: call(x))
    again = trained(lambda call, x: checkpoint(call, x, use_reentrant=use_reentrant))
    for one, other in zip(
        keras.tree.flatten(again[:2]), keras.tree.flatten(plain[:2]), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-6)
    if name not in (
        "sigmoid_bias",
        "relu",
    ):  # whose state the second run reads as the first left it
        for one, other in zip(again[2], plain[2], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(again[3], plain[3], rtol=1e-4, atol=1e-5)


def test_a_second_step_counts_again():
    import torch
    from torch.utils.checkpoint import checkpoint

    layer = layers.MoE(E, 8)
    x = torch.tensor(tokens(N, D), requires_grad=True)
    for step in (1, 2):
        checkpoint(lambda x: layer(x, training=True), x, use_reentrant=False).sum().backward()
        assert layer.running_counts()["decisions"] == step * N
