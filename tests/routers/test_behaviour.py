"""What routers do over batches: balance, noise, priority, fixed choices."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import layers, routers
from tests import helpers
from tests.oracle.moe import capacity_of

D, E = 4, 8


def built(router, width=D):
    router.build((None, width))
    return router


def max_violation(load):
    return float(np.max(load) / np.mean(load) - 1.0)


def skewed_stream(batches, count=512, seed=0):
    """Tokens with a large constant part, so that a router prefers the same experts for all."""
    rng = np.random.default_rng(seed)
    for _ in range(batches):
        yield (rng.normal(size=(count, D)) + 1.0).astype("float32")


@pytest.mark.one_backend("hundreds of steps, of which the next test has one everywhere")
def test_the_bias_balances_a_skewed_stream():
    """Wang et al. 2024: no loss, and yet the load evens out; max violation below 0.1."""
    router = built(routers.SigmoidBiasRouter(E, 2, bias_update_rate=0.002))
    helpers.randomize_weights(router, size=0.4)
    step = helpers.Callable(router, training=True)
    violations = []
    for x in skewed_stream(400, count=2048):
        routing, _ = step(x)
        violations.append(max_violation(routing.load))
    assert violations[0] > 1.0
    assert np.mean(violations[-50:]) < 0.1


def test_the_bias_follows_the_load_and_weighs_nothing():
    router = built(routers.SigmoidBiasRouter(3, 1, bias_update_rate=0.25))
    router.kernel.assign(np.eye(D, 3, dtype="float32"))
    x = np.eye(D, dtype="float32")[[0, 0, 0, 1]]
    before, _ = helpers.call(router, x, training=True)
    np.testing.assert_array_equal(before.load, [3, 1, 0])
    np.testing.assert_allclose(ops.convert_to_numpy(router.bias), [-0.25, 0.25, 0.25])
    after, _ = helpers.call(router, x, training=False)
    np.testing.assert_array_equal(after.load, [0, 4, 0])
    np.testing.assert_allclose(after.weights[0], [0.5])  # sigmoid(0), without the bias
    np.testing.assert_allclose(ops.convert_to_numpy(router.bias), [-0.25, 0.25, 0.25])


def test_the_bias_is_float32_and_frozen_with_the_router():
    layer = layers.MoE(E, 8, router="sigmoid_bias", dtype="mixed_bfloat16")
    layer.build((None, D))
    assert keras.backend.standardize_dtype(layer.router.bias.dtype) == "float32"
    layer.router.trainable = False
    helpers.call(layer, np.ones((16, D), "float32"), training=True)
    np.testing.assert_array_equal(ops.convert_to_numpy(layer.router.bias), np.zeros(E))


def test_padding_does_not_move_the_bias():
    router = built(routers.SigmoidBiasRouter(E, 2))
    x = np.ones((5, D), "float32")
    helpers.call(router, x, mask=np.zeros(5, bool), training=True)
    np.testing.assert_array_equal(ops.convert_to_numpy(router.bias), np.zeros(E))


def test_groups_out_of_reach_stay_so_with_negative_biases():
    """vLLM (#13474) masked with 0, which a negative biased score falls below."""
    router = built(routers.SigmoidBiasRouter(4, 2, num_groups=2, top_groups=1))
    router.bias.assign(np.array([-3.0, -3.0, -4.0, -4.0], "float32"))
    routing, _ = helpers.call(router, np.ones((6, D), "float32"))
    assert set(routing.experts.ravel()) == {0, 1}


def test_sinkhorn_is_balanced_in_training_only():
    router = built(routers.SinkhornRouter(E, iterations=30))
    helpers.randomize_weights(router)
    (x,) = skewed_stream(1, count=2048)
    trained, _ = helpers.call(router, x, training=True)
    plain, _ = helpers.call(router, x, training=False)
    assert max_violation(trained.load) < 0.5 < 1.0 < max_violation(plain.load)


def test_relu_penalty_finds_the_sparsity_that_is_asked_for():
    """lambda rises while too many experts are active and falls while too few are."""
    router = built(routers.ReLURouter(E, 2, initial_penalty=1.0, rate=1.5))
    router.kernel.assign(np.ones((D, E), "float32"))
    helpers.call(router, np.ones((4, D), "float32"), training=True)
    assert float(ops.convert_to_numpy(router.penalty)) == pytest.approx(1.5)
    helpers.call(router, -np.ones((4, D), "float32"), training=True)
    assert float(ops.convert_to_numpy(router.penalty)) == pytest.approx(1.0)
    helpers.call(router, np.ones((4, D), "float32"), training=False)
    assert float(ops.convert_to_numpy(router.penalty)) == pytest.approx(1.0)


def test_relu_drops_nothing_and_counts_what_it_asked_for():
    layer = layers.MoE(E, 8, router="relu", top_k=2)
    layer.build((None, D))
    helpers.randomize_weights(layer)
    (x,) = skewed_stream(1, count=64)
    _, routing = helpers.call(layer, x, return_routing=True, training=True)[0]
    counts = layer.running_counts()
    assert counts["dropped"] == 0
    assert counts["assignments"] == routing.kept.sum() < 64 * E


@pytest.mark.parametrize("group", ["batch", "example"])
@pytest.mark.parametrize("factor", [0.25, 0.5])
def test_the_surest_tokens_get_the_slots(factor, group):
    """V-MoE, algorithm 1: tokens by their largest weight, first choices before second ones."""
    layer = layers.MoE(
        4, 8, router="batch_priority", top_k=2, capacity_factor=factor, capacity_group=group
    )
    layer.build((None, None, D))
    helpers.randomize_weights(layer)
    x = np.random.default_rng(3).normal(size=(3, 16, D)).astype("float32")
    mask = np.arange(16) < np.array([[16], [9], [3]])
    (_, routing), _ = helpers.call(layer, x, mask=mask, return_routing=True)
    expected = np.zeros(routing.kept.shape, bool)
    groups = [[0, 1, 2]] if group == "batch" else [[0], [1], [2]]
    for examples in groups:
        slots = capacity_of(factor, 2, 16 * len(examples), 4)
        used = np.zeros(4, int)
        tokens = [(b, n) for b in examples for n in range(16) if mask[b, n]]
        tokens.sort(key=lambda at: -routing.weights[at].max())
        for choice in range(2):
            for at in tokens:
                expert = routing.experts[at][choice]
                expected[at][choice] = used[expert] < slots
                used[expert] += 1
    np.testing.assert_array_equal(routing.kept, expected)
    assert not expected[mask].all()


def test_noise_is_drawn_anew_in_training_and_off_at_inference():
    for name in ("noisy_top_k", "batch_priority", "random"):
        router = built(routers.get(name, num_experts=E, top_k=2, seed=1))
        helpers.randomize_weights(router, size=0.01)
        x = np.random.default_rng(0).normal(size=(64, D)).astype("float32")
        once, again = (helpers.call(router, x, training=True)[0] for _ in range(2))
        assert (once.experts != again.experts).any(), name
        once, again = (helpers.call(router, x, training=False)[0] for _ in range(2))
        np.testing.assert_array_equal(once.experts, again.experts)
        np.testing.assert_array_equal(once.weights, again.weights)


def test_a_hash_depends_on_the_token_alone():
    router = built(routers.HashRouter(E, 2, seed=7))
    x = np.random.default_rng(0).normal(size=(256, D)).astype("float32")
    whole, _ = helpers.call(router, x)
    part, _ = helpers.call(router, x[100:])
    np.testing.assert_array_equal(whole.experts[100:], part.experts)
    assert (whole.load > 0).all()
    twin = built(routers.HashRouter(E, 2, seed=7))
    np.testing.assert_array_equal(helpers.call(twin, x)[0].experts, whole.experts)


def test_a_fixed_router_learns_nothing():
    for name in ("hash", "random", "uniform"):
        layer = layers.MoE(E, 8, router=name)
        layer.build((None, D))
        assert not layer.router.trainable_variables
        assert helpers.call(layer, np.ones((4, D), "float32"))[1] == []


def test_coefficients_are_the_routers_own_unless_given():
    assert layers.MoE(E, 8).router.loss_weights == {"balance": 0.01, "z_loss": 0.001}
    own = layers.MoE(E, 8, router="sigmoid_bias")
    assert own.router.loss_weights == {"balance": 0.0, "z_loss": 0.0}
    given = layers.MoE(E, 8, router="sigmoid_bias", balance_weight=0.5, z_loss_weight=0.25)
    assert given.router.loss_weights == {"balance": 0.5, "z_loss": 0.25}


def test_losses_are_zero_and_finite_where_all_is_padding():
    for name in ("noisy_top_k", "batch_priority", "sigmoid_bias", "sinkhorn", "relu"):
        router = built(routers.get(name, num_experts=E, top_k=2))
        helpers.randomize_weights(router)
        x = np.random.default_rng(0).normal(size=(6, D)).astype("float32")
        routing, _ = helpers.call(router, x, mask=np.zeros(6, bool), training=True)
        assert set(routing.losses) == {"balance", "z_loss", *router.loss_weights}
        for loss, value in routing.losses.items():
            assert float(value) == 0.0, (name, loss)


@pytest.mark.parametrize("name", ["sigmoid_bias", "top_k"])
def test_no_nan_gradient_where_all_sigmoid_scores_are_0(name):
    """Far below 0 all underflow, and a quotient's gradient divides by the square of their sum."""
    kind = {"sigmoid_bias": routers.SigmoidBiasRouter, "top_k": routers.TopKRouter}[name]
    layer = layers.MoE(E, 8, router=kind(E, 2, score="sigmoid", losses={"balance": 1.0}))
    layer.build((None, D))
    layer.router.kernel.assign(np.ones((D, E), "float32"))
    call = helpers.Differentiable(layer)
    for logit in (-10.0, -45.0, -50.0, -95.0, -1000.0):
        x = np.full((8, D), logit / D, "float32")
        _, _, gradients = call(x, np.ones_like(x))
        assert all(np.isfinite(each).all() for each in gradients.values()), logit


def test_no_nan_gradient_at_perfect_balance():
    """V-MoE's (std / mean)^2 has one (#218)."""
    for name in ("noisy_top_k", "batch_priority"):
        layer = layers.MoE(E, 8, router=name, top_k=2)
        layer.build((None, D))
        layer.router.kernel.assign(np.zeros((D, E), "float32"))
        x = np.random.default_rng(0).normal(size=(8, D)).astype("float32")
        _, _, gradients = helpers.values_and_gradients(layer, x, np.ones_like(x), training=False)
        assert all(np.isfinite(each).all() for each in gradients.values()), name
