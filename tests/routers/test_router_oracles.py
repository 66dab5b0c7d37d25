"""Every router equals its float64 oracle: choices, weights, losses and gradients."""

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import routers
from tests import helpers
from tests.helpers import some_everywhere
from tests.oracle import routers as oracle

N, D, E = 9, 4, 6
COEFFICIENTS = {
    "balance": 0.7,
    "z_loss": 0.3,
    "importance": 0.5,
    "load": 0.4,
    "l1": 1.0,
    "entropy": 0.6,
    "unused": 0.2,
    "sequence_balance": 0.8,
    "local_entropy": 0.9,
    "global_entropy": 1.1,
    "first_choice_balance": 0.65,
    "sequence_importance": 0.45,
    "sequence_load": 0.35,
}
# The losses that are off unless they have a coefficient, whatever it is.
ALL_LOSSES = dict.fromkeys(
    ["sequence_balance", "first_choice_balance", "local_entropy", "global_entropy"], 1.0
)
OF_SEQUENCES = {"sequence_importance": 1.0, "sequence_load": 1.0}
BIAS = np.array([0.4, -0.3, 0.0, 0.2, -0.5, 0.1])
PENALTY = 0.25
VOCABULARY = 11
IDS = np.array([3, 12, 0, 10, 3, -1, 7, 5, 30], "int32")


@dataclasses.dataclass(frozen=True)
class Case:
    """A router, its oracle, what that must know, and the sequences that the tokens are."""

    make: Callable[[], routers.Router]
    rule: Callable[..., oracle.Decision]
    settings: dict[str, Any]
    is_noisy: bool = False
    sequences: int = 1


def top_k(k, **arguments):
    return Case(lambda: routers.TopKRouter(E, k, **arguments), oracle.top_k, {"k": k, **arguments})


def noisy(k):
    return Case(lambda: routers.NoisyTopKRouter(E, k), oracle.noisy_top_k, {"k": k}, True)


def prioritized(k, std):
    settings = {"k": k, "std": 1.0 / E if std is None else std}
    return Case(
        lambda: routers.BatchPriorityRouter(E, k, noise_std=std),
        oracle.batch_priority,
        settings,
        bool(settings["std"]),
    )


def biased(k, scale=1.0, groups=1, top_groups=1):
    return Case(
        lambda: routers.SigmoidBiasRouter(
            E, k, routed_scale=scale, num_groups=groups, top_groups=top_groups
        ),
        oracle.sigmoid_bias,
        {"k": k, "bias": BIAS, "scale": scale, "groups": groups, "top_groups": top_groups},
    )


def relu(aim, most=None):
    return Case(
        lambda: routers.ReLURouter(E, aim, max_experts=most, initial_penalty=PENALTY),
        oracle.relu,
        {"k": most or E, "aim": aim, "penalty": PENALTY},
    )


def no_token_left(k, factor, rounds=E, **arguments):
    settings = {"k": k, "factor": factor, "rounds": rounds, **arguments}
    return Case(
        lambda: routers.NoTokenLeftRouter(E, k, capacity_factor=factor, rounds=rounds, **arguments),
        oracle.no_token_left,
        settings,
    )


def with_all_losses(make, rule, sequences, is_noisy=False, **settings):
    rule = oracle.with_all_losses(rule, sequences)
    return Case(lambda: make(losses=ALL_LOSSES), rule, settings, is_noisy, sequences)


def of_sequences(make, rule, sequences, **settings):
    rule = oracle.with_losses_of_sequences(rule, sequences)
    return Case(lambda: make(losses=OF_SEQUENCES), rule, settings, True, sequences)


def dselect(k, num_experts=E, static=False, gamma=4.0):
    settings = {"k": k, "num_experts": num_experts, "gamma": gamma, "static": static}
    return Case(
        lambda: routers.DSelectKRouter(num_experts, k, static=static, gamma=gamma),
        oracle.dselect_k,
        settings,
    )


CASES = {
    "top_1": top_k(1),
    "top_3": top_k(3),
    "top_2_not_normalized": top_k(2, normalize=False),
    "top_1_sigmoid": top_k(1, score="sigmoid"),
    "top_2_sigmoid": top_k(2, score="sigmoid"),
    "top_2_sigmoid_not_normalized": top_k(2, score="sigmoid", normalize=False),
    "switch": Case(
        lambda: routers.SwitchRouter(E, jitter=0.0), oracle.top_k, {"k": 1, "normalize": False}
    ),
    "noisy_top_1": noisy(1),
    "noisy_top_2": noisy(2),
    "noisy_top_all": noisy(E),
    "batch_priority": prioritized(2, None),
    "batch_priority_wide": prioritized(3, 1.5),
    "batch_priority_no_noise": prioritized(1, 0.0),
    "sigmoid_bias_1": biased(1),
    "sigmoid_bias_3": biased(3, scale=2.5),
    "sigmoid_bias_groups": biased(2, groups=3, top_groups=2),
    "sigmoid_bias_groups_of_1": biased(2, groups=6, top_groups=4),
    "sinkhorn_1": Case(
        lambda: routers.SinkhornRouter(E, iterations=5), oracle.sinkhorn, {"k": 1, "iterations": 5}
    ),
    "sinkhorn_2": Case(
        lambda: routers.SinkhornRouter(E, 2), oracle.sinkhorn, {"k": 2, "iterations": 8}
    ),
    "relu": relu(2),
    "relu_at_most_3": relu(1, 3),
    "dselect_1": dselect(1),
    "dselect_2_of_8": dselect(2, 8),
    "dselect_2_narrow": dselect(2, 8, gamma=1.0),
    "dselect_3_static": dselect(3, static=True),
    "dselect_1_of_1": dselect(1, 1),
    "dselect_3_of_3": dselect(3, 3),
    "dselect_2_of_5_static": dselect(2, 5, static=True),
    "dselect_3_of_7": dselect(3, 7),
    "dense": Case(lambda: routers.DenseRouter(E), oracle.dense, {}),
    "expert_choice": Case(lambda: routers.ExpertChoiceRouter(E, 2), oracle.dense, {}),
    "hash": Case(lambda: routers.HashRouter(E, 2, seed=3), oracle.hashed, {"k": 2}),
    "random": Case(lambda: routers.RandomRouter(E, 2, seed=3), oracle.hashed, {"k": 2}, True),
    "token_hash": Case(
        lambda: routers.TokenHashRouter(E, VOCABULARY, 3, seed=3),
        oracle.token_hash,
        {"k": 3, "num_experts": E, "ids": IDS},
    ),
    "no_token_left_1": no_token_left(1, 1.0),
    "no_token_left_1_drops": no_token_left(1, 0.5),
    "no_token_left_1_one_round": no_token_left(1, 0.7, rounds=1),
    "no_token_left_2": no_token_left(2, 0.7),
    "no_token_left_2_three_rounds": no_token_left(2, 0.5, rounds=3),
    "no_token_left_2_not_normalized": no_token_left(2, 1.0, normalize=False),
    "no_token_left_3_sigmoid": no_token_left(3, 0.6, score="sigmoid"),
    "no_token_left_2_ample": no_token_left(2, 9.0),
    "no_token_left_2_all_losses_3_sequences": Case(
        lambda: routers.NoTokenLeftRouter(E, 2, capacity_factor=0.7, losses=ALL_LOSSES),
        oracle.no_token_left,
        {"k": 2, "factor": 0.7, "rounds": E, "sequences": 3},
        sequences=3,
    ),
    "top_1_all_losses": with_all_losses(
        lambda **more: routers.TopKRouter(E, 1, **more), oracle.top_k, 1, k=1
    ),
    "top_2_all_losses_3_sequences": with_all_losses(
        lambda **more: routers.TopKRouter(E, 2, **more), oracle.top_k, 3, k=2
    ),
    "top_2_sigmoid_all_losses_9_sequences": with_all_losses(
        lambda **more: routers.TopKRouter(E, 2, score="sigmoid", **more),
        oracle.top_k,
        9,
        k=2,
        score="sigmoid",
    ),
    "sigmoid_bias_all_losses_3_sequences": with_all_losses(
        lambda **more: routers.SigmoidBiasRouter(E, 2, **more),
        oracle.sigmoid_bias,
        3,
        k=2,
        bias=BIAS,
    ),
    "relu_all_losses_3_sequences": with_all_losses(
        lambda **more: routers.ReLURouter(E, 2, initial_penalty=PENALTY, **more),
        oracle.relu,
        3,
        k=E,
        aim=2,
        penalty=PENALTY,
    ),
    "noisy_top_2_all_losses_3_sequences": with_all_losses(
        lambda **more: routers.NoisyTopKRouter(E, 2, **more), oracle.noisy_top_k, 3, True, k=2
    ),
    "noisy_top_2_of_3_sequences": of_sequences(
        lambda **more: routers.NoisyTopKRouter(E, 2, **more), oracle.noisy_top_k, 3, k=2
    ),
    "noisy_top_all_of_9_sequences": of_sequences(
        lambda **more: routers.NoisyTopKRouter(E, E, **more), oracle.noisy_top_k, 9, k=E
    ),
    "batch_priority_of_3_sequences": of_sequences(
        lambda **more: routers.BatchPriorityRouter(E, 2, noise_std=1.5, **more),
        oracle.batch_priority,
        3,
        k=2,
        std=1.5,
    ),
    "uniform": Case(lambda: routers.UniformRouter(E), oracle.uniform, {"num_experts": E}),
}


class WithLosses(keras.layers.Layer):
    """A router whose losses count, with the coefficients above."""

    def __init__(self, router, sequences=1):
        super().__init__(name="outer", dtype="float32")
        self.router, self.sequences = router, sequences
        self.supports_masking = True

    def build(self, input_shape):
        self.router.build(input_shape)

    def call(self, inputs, mask=None, training=None, token_ids=None):
        more = {"token_ids": token_ids} if self.router.needs_token_ids else {}
        more["num_sequences"] = self.sequences
        routing = self.router(inputs, mask=mask, training=training, **more)
        for name, loss in routing.losses.items():
            self.add_loss(coefficients(self.router)[name] * loss)
        return routing


def coefficients(router):
    # Fixed routers and DSelect-k, whose logits are logarithms of weights, have neither loss.
    without = (
        routers.DSelectKRouter,
        routers.HashRouter,
        routers.TokenHashRouter,
        routers.UniformRouter,
    )
    if isinstance(router, without):
        return {**COEFFICIENTS, "balance": 0.0, "z_loss": 0.0}
    return COEFFICIENTS


CALLS = {
    f"{'training' if training else 'inference'}-{'masked' if masked else 'all'}": (training, masked)
    for training in (False, True)
    for masked in (False, True)
}


@pytest.mark.parametrize(
    ("training", "masked"),
    some_everywhere(
        CALLS, ["inference-all", "training-masked"], "noise and masks, one without the other"
    ),
)
@pytest.mark.parametrize("name", CASES)
def test_equals_its_oracle(monkeypatch, name, training, masked):
    case = CASES[name]
    rng = np.random.default_rng(5)
    x = rng.normal(size=(N, D)).astype("float32")
    mask = np.arange(N) % 4 != 1 if masked else np.ones(N, bool)
    draw = rng.normal(size=(N, E)).astype("float32")
    monkeypatch.setattr(keras.random, "normal", lambda *args, **kwargs: ops.convert_to_tensor(draw))
    layer = WithLosses(case.make(), case.sequences)
    layer.build((None, D))
    router = layer.router
    helpers.randomize_weights(layer)
    settings = dict(case.settings)
    if "bias" in settings:
        router.bias.assign(BIAS.astype("float32"))
    if "iterations" in settings:
        settings["training"] = training
    if hasattr(router, "projection"):
        settings["projection"] = ops.convert_to_numpy(router.projection).astype("float64")
    if "ids" in settings:
        settings["table"] = ops.convert_to_numpy(router.table)

    weights = {
        path.rsplit("/")[-1]: value.astype("float64")
        for path, value in helpers.weights_of(layer).items()
    }
    noise = draw.astype("float64") if case.is_noisy and training else None
    arguments = (x.astype("float64"), weights, mask, noise)
    expected = case.rule(*arguments, **settings)
    cotangent = rng.normal(size=expected.weights.shape).astype("float32")
    # Where padding goes is nobody's business: a balanced assignment has no place for it.
    real = mask if "iterations" in settings else slice(None)
    cotangent[~mask & ("iterations" in settings)] = 0.0
    call = {"training": training, **({"mask": mask} if masked else {})}
    if "ids" in settings:
        call["token_ids"] = IDS
    if layer.trainable_variables:
        routing, losses, gradients = helpers.values_and_gradients(
            layer, x, cotangent, lambda result: result.weights, **call
        )
    else:  # nothing depends on anything, which torch refuses to differentiate
        routing, losses = helpers.call(layer, x, **call)
        gradients = {"inputs": np.zeros_like(x)}

    np.testing.assert_array_equal(routing.experts[real], expected.experts[real])
    np.testing.assert_array_equal(routing.kept, expected.kept)
    helpers.assert_all_close(
        {"weights": routing.weights[real], **routing.losses},
        {"weights": expected.weights[real], **expected.losses},
    )
    assert sum(losses) == pytest.approx(
        sum(coefficients(router)[each] * loss for each, loss in expected.losses.items()), rel=1e-5
    )
    slopes = oracle.gradients(case.rule, *arguments, cotangent, coefficients(router), **settings)
    actual = {path.rsplit("/")[-1]: value for path, value in gradients.items()}
    helpers.assert_all_close(actual, slopes)
