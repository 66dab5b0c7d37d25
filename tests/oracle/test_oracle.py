"""The oracles' own gradients, against central differences in float64."""

import itertools

import numpy as np
import pytest

from tests.oracle import activations, expert_mlp, losses, mmoe, moe, soft_moe

pytestmark = pytest.mark.one_backend("NumPy in float64")

_STEP = 1e-5


def central_difference(function, value):
    """The gradient of a scalar function at `value`, entry by entry."""
    gradient = np.zeros_like(value)
    for index in np.ndindex(value.shape):
        moved = []
        for step in (_STEP, -_STEP):
            copy = value.copy()
            copy[index] += step
            moved.append(function(copy))
        gradient[index] = (moved[0] - moved[1]) / (2 * _STEP)
    return gradient


def assert_gradients(gradients, function, arrays):
    """`function(arrays)` is the scalar; each gradient agrees to 1e-6 of its largest entry."""
    assert set(gradients) == set(arrays)
    for name, value in arrays.items():
        expected = central_difference(lambda v, n=name: function({**arrays, n: v}), value)
        scale = max(np.max(np.abs(expected)), 1e-3)
        error = np.max(np.abs(gradients[name] - expected)) / scale
        assert error < 1e-6, f"{name}: {error:.2e}"


def normal(rng, *shape):
    return rng.normal(size=shape)


def mlp_weights(rng, prefix, num_experts, widths, gated_layers=(), use_bias=True):
    weights = {}
    for i, (rows, columns) in enumerate(itertools.pairwise(widths)):
        names = ["kernel", *(["gate_kernel"] if i in gated_layers else [])]
        for name in names:
            weights[f"{prefix}{name}_{i}"] = normal(rng, num_experts, rows, columns)
            if use_bias:
                bias = f"{prefix}{name.replace('kernel', 'bias')}_{i}"
                weights[bias] = normal(rng, num_experts, columns)
    return weights


@pytest.mark.parametrize("name", sorted(activations.BY_NAME))
def test_activation_derivatives(name):
    x = np.array([-2.3, -0.4, 0.3, 1.7])
    value = activations.BY_NAME[name]
    slope = (value(x + _STEP)[0] - value(x - _STEP)[0]) / (2 * _STEP)
    np.testing.assert_allclose(value(x)[1], slope, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("activate_last", [False, True])
@pytest.mark.parametrize("rows", ["own", "shared", "blocks"])
def test_expert_mlp(gated, activate_last, rows):
    rng = np.random.default_rng(1)
    first = {"own": 2, "shared": 1, "blocks": 3}[rows]
    inputs = normal(rng, first, 2, 3)
    layers = ((0, 1) if activate_last else (0,)) if gated else ()
    weights = mlp_weights(rng, "", 2, (3, 4, 3), layers)
    cotangent = normal(rng, 3 if rows == "blocks" else 2, 2, 3)
    settings = {
        "activation": "silu",
        "activate_last": activate_last,
        "block_experts": [1, 0, 1] if rows == "blocks" else None,
    }

    def scalar(arrays):
        own = {k: v for k, v in arrays.items() if k != "inputs"}
        return np.sum(cotangent * expert_mlp.run(arrays["inputs"], own, cotangent, **settings)[0])

    _, gradients = expert_mlp.run(inputs, weights, cotangent, **settings)
    assert_gradients(gradients, scalar, {"inputs": inputs, **weights})


MOE_CASES = {
    "top_2": {},
    "top_2_not_normalized": {"normalize": False},
    "top_1": {"top_k": 1},
    "top_3_glu": {"top_k": 3, "gated": True, "activation": "silu"},
    "dense": {"top_k": 4, "normalize": False},
    "capacity": {"capacity_factor": 0.5},
    "capacity_by_example": {"capacity_factor": 0.5, "capacity_group": "example"},
    "by_example": {"routing_level": "example"},
    "masked": {"masked": True, "capacity_factor": 0.75},
    "masked_by_example": {"masked": True, "routing_level": "example"},
    "shared_experts": {"shared": 2, "output_dim": 2},
    "relu": {"activation": "relu"},
    "gelu_tanh": {"activation": "gelu_tanh"},
}


@pytest.mark.parametrize("case", MOE_CASES)
def test_moe(case):
    settings = {"balance_weight": 0.7, "z_loss_weight": 0.3, **MOE_CASES[case]}
    masked, gated = settings.pop("masked", False), settings.pop("gated", False)
    shared, output_dim = settings.pop("shared", 0), settings.pop("output_dim", 3)
    rng = np.random.default_rng(2)
    inputs = normal(rng, 2, 4, 3)
    mask = np.array([[1, 1, 0, 1], [1, 0, 0, 0]], bool) if masked else None
    gated_layers = (0,) if gated else ()
    weights = {
        "router/kernel": normal(rng, 3, 4),
        **mlp_weights(rng, "experts/", 4, (3, 4, output_dim), gated_layers),
    }
    if shared:
        weights |= mlp_weights(rng, "shared_experts/", shared, (3, 4, output_dim), gated_layers)
    cotangent = normal(rng, 2, 4, output_dim)

    def scalar(arrays):
        own = {k: v for k, v in arrays.items() if k != "inputs"}
        result = moe.run(arrays["inputs"], own, None, mask, **settings)
        return np.sum(cotangent * result.outputs) + result.loss

    result = moe.run(inputs, weights, cotangent, mask, **settings)
    if "capacity_factor" in settings:
        assert not result.kept.all(), "the case must drop something"
    assert_gradients(result.gradients, scalar, {"inputs": inputs, **weights})


@pytest.mark.parametrize("mixing", ["soft", "soft_uniform", "uniform_soft", "uniform", "identity"])
@pytest.mark.parametrize("per_expert", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_soft_moe(mixing, per_expert, masked):
    rng = np.random.default_rng(3)
    count = 2 * per_expert if mixing == "identity" else 3
    inputs = normal(rng, 3, count, 3)
    mask = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [0, 1, 1, 1]], bool)[:, :count]
    mask = mask if masked else None
    weights = mlp_weights(rng, "experts/", 2, (3, 4, 2))
    if mixing not in ("uniform", "identity"):
        weights |= {"router/phi": normal(rng, 3, 2, per_expert), "router/scale": np.array(1.7)}
    cotangent = normal(rng, 3, count, 2)
    settings = {"mixing": mixing, "per_expert": per_expert}

    def scalar(arrays):
        own = {k: v for k, v in arrays.items() if k != "inputs"}
        outputs, _, _ = soft_moe.run(arrays["inputs"], own, cotangent, mask, **settings)
        return np.sum(cotangent * outputs)

    _, _, gradients = soft_moe.run(inputs, weights, cotangent, mask, **settings)
    assert_gradients(gradients, scalar, {"inputs": inputs, **weights})


@pytest.mark.parametrize("gate_hidden", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_mmoe(gate_hidden, masked):
    rng = np.random.default_rng(4)
    inputs = normal(rng, 4, 3)
    mask = np.array([1, 0, 1, 1], bool) if masked else None
    weights = {
        "gates/kernel": normal(rng, 2, 4 if gate_hidden else 3, 3),
        **mlp_weights(rng, "experts/", 3, (3, 4, 2)),
    }
    if gate_hidden:
        weights |= mlp_weights(rng, "gate_hidden/", 2, (3, 4))
    cotangents = normal(rng, 2, 4, 2)

    def scalar(arrays):
        own = {k: v for k, v in arrays.items() if k != "inputs"}
        outputs = mmoe.run(arrays["inputs"], own, cotangents, mask, activation="silu")[0]
        return np.sum(cotangents * outputs)

    _, _, gradients = mmoe.run(inputs, weights, cotangents, mask, activation="silu")
    assert_gradients(gradients, scalar, {"inputs": inputs, **weights})


def test_losses_by_hand():
    """Two experts, three tokens, the last one padding: f = (3/4, 1/4) by hand."""
    logits = np.log(np.array([[3.0, 1.0], [1.0, 1.0], [9.0, 1.0]]))
    p = np.array([losses.softmax(row) for row in logits])
    experts = np.array([[0, 0], [0, 1], [1, 1]])
    is_token = np.array([True, True, False])
    value, _ = losses.balance(p, experts, is_token)
    assert value == pytest.approx(2 * (0.75 * 0.625 + 0.25 * 0.375))
    value, _ = losses.z_loss(logits, is_token)
    assert value == pytest.approx((np.log(4.0) ** 2 + np.log(2.0) ** 2) / 2)
