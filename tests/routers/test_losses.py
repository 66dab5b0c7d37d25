"""The auxiliary losses: what they are at balance, with padding, and at the edges of the numbers."""

import keras
import numpy as np
import pytest

from keras_moe import layers, routers
from keras_moe.routers import losses
from tests import helpers
from tests.oracle import losses as oracle

pytestmark = pytest.mark.one_backend("formulas of few operations, which the oracles cover")

D = 4
ALL = {
    "sequence_balance": 0.5,
    "local_entropy": 0.25,
    "global_entropy": 0.125,
}
HAVE_PROBABILITIES = {
    "top_k": lambda **more: routers.TopKRouter(4, 2, **more),
    "top_k_sigmoid": lambda **more: routers.TopKRouter(4, 2, score="sigmoid", **more),
    "switch": lambda **more: routers.SwitchRouter(4, jitter=0.0, **more),
    "noisy_top_k": lambda **more: routers.NoisyTopKRouter(
        4, kernel_initializer="glorot_uniform", **more
    ),
    "batch_priority": lambda **more: routers.BatchPriorityRouter(4, **more),
    "no_token_left": lambda **more: routers.NoTokenLeftRouter(4, 2, capacity_factor=0.5, **more),
    "sigmoid_bias": lambda **more: routers.SigmoidBiasRouter(4, 2, **more),
    "sinkhorn": lambda **more: routers.SinkhornRouter(4, 2, **more),
    "relu": lambda **more: routers.ReLURouter(4, 2, **more),
}
ENTROPIES_ONLY = {  # all experts take part in all tokens: their sequence balance is always 1
    "dense": lambda **more: routers.DenseRouter(4, **more),
    "expert_choice": lambda **more: routers.ExpertChoiceRouter(4, 2, **more),
    "dselect_k": lambda **more: routers.DSelectKRouter(4, 2, **more),
}


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(*shape, D)).astype("float32")


def numpy(value):
    return float(keras.ops.convert_to_numpy(value))


def tensor(array):
    return keras.ops.convert_to_tensor(array)


def balanced(num_experts, top_k, sequences, strength):
    """Each sequence's tokens prefer experts n, n + 1, ... in turn."""
    preference = np.stack([np.roll(-np.arange(num_experts), n) for n in range(num_experts)])
    logits = np.tile(strength * preference, (sequences, 1)).astype("float32")
    experts = np.tile(
        (np.arange(num_experts)[:, None] + np.arange(top_k)) % num_experts, (sequences, 1)
    )
    return np.stack([oracle.softmax(row) for row in logits]).astype("float32"), experts


@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 1), (4, 2), (5, 5), (64, 8)])
@pytest.mark.parametrize("strength", [0.0, 1.0, 30.0])
def test_values_at_perfect_balance(num_experts, top_k, strength):
    """The sequence balance is 1 and the global entropy loss 0, for every E and k."""
    p, experts = balanced(num_experts, top_k, 3, strength)
    chosen = np.ones(experts.shape, bool)
    value = losses.sequence_balance_loss(
        tensor(p), tensor(experts.astype("int32")), tensor(chosen), 3, None
    )
    assert numpy(value) == pytest.approx(1.0, rel=1e-5)
    assert numpy(losses.global_entropy_loss(tensor(p), None)) == pytest.approx(0.0, abs=1e-5)
    local = numpy(losses.local_entropy_loss(tensor(p), None))
    assert local == pytest.approx(1.0, rel=1e-5) if strength == 0 else local < 1.0
    if strength == 30.0:
        assert local == pytest.approx(0.0, abs=1e-5)


def test_a_batch_in_balance_of_sequences_that_are_not():
    """What the loss is for: each sequence has one expert, and the batch has all alike."""
    p = np.repeat(np.eye(4, dtype="float32"), 5, axis=0)
    experts = np.repeat(np.arange(4, dtype="int32"), 5)[:, None]
    chosen = np.ones((20, 1), bool)
    load = np.full(4, 5.0, "float32")
    assert numpy(losses.balance_loss(tensor(p), tensor(load), 1, None)) == pytest.approx(1.0)
    arguments = (tensor(p), tensor(experts), tensor(chosen))
    assert numpy(losses.sequence_balance_loss(*arguments, 4, None)) == pytest.approx(4.0)
    assert numpy(losses.sequence_balance_loss(*arguments, 1, None)) == pytest.approx(1.0)


@pytest.mark.every_backend
@pytest.mark.parametrize("name", HAVE_PROBABILITIES)
def test_a_layer_adds_them_for_each_sequence(name):
    """Against the oracle, with padding and a sequence of nothing but padding."""
    layer = layers.MoE(4, 5, router=HAVE_PROBABILITIES[name](losses=ALL))
    layer.build((None, None, D))
    helpers.randomize_weights(layer)
    x, mask = tokens(3, 5), np.arange(5) < np.array([[5], [2], [0]])
    (_, routing), added = helpers.call(layer, x, mask=mask, return_routing=True)
    flat = routing.logits.reshape(-1, 4).astype("float64")
    scores = np.stack([oracle.softmax(row) for row in flat])
    if name in ("top_k_sigmoid", "sigmoid_bias"):
        scores = 1.0 / (1.0 + np.exp(-flat))
        scores /= scores.sum(axis=1, keepdims=True)
    experts, kept = routing.experts.reshape(15, -1), routing.kept.reshape(15, -1)
    if name == "no_token_left":  # before the overflow
        experts, kept = np.argsort(-flat, axis=1)[:, :2], np.repeat(mask.reshape(-1, 1), 2, axis=1)
    real = mask.ravel()
    expected = {
        "sequence_balance": oracle.sequence_balance(scores, experts, kept, real, 3),
        "local_entropy": oracle.local_entropy(scores, real),
        "global_entropy": oracle.global_entropy(scores, real),
    }
    for loss, value in expected.items():
        assert routing.losses[loss] == pytest.approx(value, rel=1e-5), loss
    weights = layer.router.loss_weights
    assert set(routing.losses) == {"balance", "z_loss", *weights}
    total = sum(weights.get(each, 0.0) * value for each, value in routing.losses.items())
    assert sum(added) == pytest.approx(float(total), rel=1e-5)
    alone, _ = helpers.call(layer, x[0][None])
    assert np.isfinite(alone).all()


@pytest.mark.every_backend
@pytest.mark.parametrize("name", [*HAVE_PROBABILITIES, *ENTROPIES_ONLY])
def test_no_gradient_is_nan(name):
    """At balance, at zero vectors, for sure routers, with one token, and with none."""
    make = {**HAVE_PROBABILITIES, **ENTROPIES_ONLY}[name]
    kinds = ALL if name in HAVE_PROBABILITIES else dict(list(ALL.items())[1:])
    layer = layers.MoE(4, 5, router=make(losses=kinds))
    layer.build((None, None, D))
    helpers.randomize_weights(layer)
    call = helpers.Differentiable(layer)
    x, one = tokens(2, 3), np.arange(6).reshape(2, 3) == 4

    def check(x, mask):
        outputs, added, gradients = call(x, np.ones_like(x), mask=mask)
        for array in (outputs, *added, *gradients.values()):
            assert np.isfinite(array).all()
        return added

    check(x, ~one | one)
    check(np.zeros_like(x), ~one | one)
    check(1e4 * x, ~one | one)  # probabilities of exactly 0 and 1
    check(x, one)
    assert sum(check(x, one & ~one)) == 0.0, "an all-padding batch costs nothing"


@pytest.mark.parametrize("name", HAVE_PROBABILITIES)
def test_they_are_off_unless_asked_for_and_saved(name):
    plain = HAVE_PROBABILITIES[name]()
    assert not set(plain.loss_weights) & {"sequence_balance", "local_entropy", "global_entropy"}
    router = HAVE_PROBABILITIES[name](losses=ALL)
    again = type(router).from_config(router.get_config())
    assert again.loss_weights == router.loss_weights
    assert set(router.loss_weights) - set(plain.loss_weights) == {
        "sequence_balance",
        "local_entropy",
        "global_entropy",
    }


def test_one_expert_costs_nothing():
    router = routers.TopKRouter(1, 1, losses=ALL)
    router.build((None, D))
    routing, _ = helpers.call(router, tokens(5))
    assert routing.losses["sequence_balance"] == pytest.approx(1.0)
    assert routing.losses["local_entropy"] == routing.losses["global_entropy"] == 0.0


def test_the_entropies_move_the_router_their_way():
    """Minimised, the local loss makes tokens sure, and the global one uses all experts."""
    x = tokens(64) + 1.0
    for name, down in (("local_entropy", True), ("global_entropy", True)):
        router = routers.TopKRouter(4, 1, losses={"balance": 0.0, "z_loss": 0.0, name: 1.0})
        layer = layers.MoE(4, 5, router=router)
        inputs = keras.Input((D,))
        model = keras.Model(inputs, 0.0 * layer(inputs))
        model.compile(keras.optimizers.Adam(0.05), "mse")
        layer.router.kernel.assign(0.3 * np.random.default_rng(0).normal(size=(D, 4)))
        before, _ = helpers.call(router, x)
        model.fit(x, np.zeros_like(x), epochs=30, verbose=0)
        after, _ = helpers.call(router, x)
        loss = name.removesuffix("_weight")
        assert (after.losses[loss] < 0.5 * before.losses[loss]) == down, loss


def test_sequences_are_examples_whatever_the_rank():
    router = routers.TopKRouter(4, 2, losses=ALL)
    layer = layers.MoE(4, 5, router=router)
    layer.build((None, None, None, D))
    helpers.randomize_weights(layer)
    x = tokens(2, 3, 4)
    (_, routing), _ = helpers.call(layer, x, return_routing=True)
    (_, flat), _ = helpers.call(layer, x.reshape(2, 12, D), return_routing=True)
    assert routing.losses["sequence_balance"] == pytest.approx(flat.losses["sequence_balance"])
    (_, single), _ = helpers.call(layer, x.reshape(24, D), return_routing=True)
    (_, sole), _ = helpers.call(layer, x.reshape(24, 1, D), return_routing=True)
    assert single.losses["sequence_balance"] == pytest.approx(sole.losses["sequence_balance"])
    (_, mixed), _ = helpers.call(layer, x.reshape(4, 6, D), return_routing=True)
    assert mixed.losses["sequence_balance"] != pytest.approx(flat.losses["sequence_balance"])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: layers.MoE(
                4, 5, router=routers.TopKRouter(4, losses=ALL), routing_level="example"
            ),
            "'token' where there is a loss of each sequence",
        ),
        (
            lambda: routers.TopKRouter(4, losses={"local_entropy": -1}),
            r"`losses\['local_entropy'\]` must be a number of at least 0",
        ),
        (
            lambda: routers.TopKRouter(4, losses={"global_entropy": "x"}),
            r"`losses\['global_entropy'\]` must be a number of at least 0",
        ),
        (lambda: routers.TopKRouter(4, losses={"l1": 1.0}), "a dict of coefficients of some of"),
        (lambda: routers.TopKRouter(4, losses=0.1), "must be a dict of coefficients"),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "Received: " in str(error.value)
