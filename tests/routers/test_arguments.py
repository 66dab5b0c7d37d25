"""No argument of a router is accepted and ignored: each changes something, or is refused."""

import keras
import numpy as np
import pytest

from keras_moe import layers, routers
from keras_moe.routers import registry
from tests.contract import arrays
from tests.router_checks import every_router

pytestmark = pytest.mark.one_backend("what constructors do with arguments")

E, D = 6, 4
TOKENS = np.random.default_rng(0).normal(size=(9, D)).astype("float32")
IDS = np.arange(9, dtype="int32") * 7
NEEDED = {"TokenHashRouter": {"vocabulary_size": 20}}
LOSSES = {name for rule in vars(routers).values() for name in getattr(rule, "LOSSES", ())}
# Every argument of any router: values that differ from all defaults.
VALUES = {
    "top_k": [3],
    "jitter": [0.4],
    "kernel_initializer": ["ones"],
    "kernel_regularizer": ["l2"],
    "kernel_constraint": ["unit_norm"],
    "seed": [7],
    "normalize": [True, False],
    "score": ["softmax", "sigmoid"],
    "bias_update_rate": [0.5],
    "routed_scale": [2.0],
    "num_groups": [2],
    "top_groups": [1],
    "noise_std": [0.7],
    "iterations": [1],
    "capacity_factor": [0.4],
    "eval_capacity_factor": [0.3],
    "rounds": [2],
    "static": [True],
    "gamma": [0.01],
    "max_experts": [2],
    "initial_penalty": [0.5],
    "rate": [3.0],
    "vocabulary_size": [5],
    "balance_weight": [0.0, 0.5],
    "z_loss_weight": [0.0, 0.5],
    "importance_weight": [0.5],
    "dropout": [0.5],
    **{f"losses[{name}]": [5.0] for name in sorted(LOSSES)},
}
# What an argument needs beside it to have an effect.
BESIDE = [{}, {"jitter": 0.3}, {"num_groups": 2}, {"top_k": 2}]
RULES = every_router()


def made(name, arguments):
    arguments = {**NEEDED.get(name, {}), **arguments}
    for argument in [each for each in arguments if each.startswith("losses[")]:
        arguments["losses"] = {argument[7:-1]: arguments.pop(argument)}
    return getattr(routers, name)(E, **arguments)


def everything(name, arguments):
    """All that a router does to some tokens, in training and at inference, and its weights."""
    keras.utils.set_random_seed(0)
    router = made(name, arguments)
    more = {"token_ids": IDS} if router.needs_token_ids else {}
    found = {}
    for training in (False, True):
        routing = router(TOKENS, training=training, **more)
        added = {n: w * routing.losses[n] for n, w in router.loss_weights.items()}
        found[training] = arrays((routing, added))
    described = [
        (v.path, [str(each) for each in (v.regularizer, v.constraint)]) for v in router.variables
    ]
    return [str(described), *found[False], *found[True], *arrays(router.variables)]


def is_same(one, other):
    return len(one) == len(other) and all(
        np.shape(a) == np.shape(b) and np.array_equal(a, b) for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("argument", VALUES)
@pytest.mark.parametrize("rule", RULES)
def test_each_argument_does_something_or_is_refused(rule, argument):
    accepted = 0
    for beside in BESIDE:
        for value in VALUES[argument]:
            try:
                before, after = (
                    everything(rule, given) for given in (beside, {**beside, argument: value})
                )
            except ValueError as error:
                assert argument.removeprefix("losses[").rstrip("]") in str(error) or beside
                continue
            if not is_same(before, after):
                return
            accepted += 1
    assert not accepted, f"{rule}({argument}=...) changes nothing"


NAMED = dict(registry.NAMED_ROUTERS)


@pytest.mark.parametrize("weight", ["balance", "z_loss"])
@pytest.mark.parametrize("name", NAMED)
def test_coefficients_of_a_named_router(name, weight):
    arguments = {f"{weight}_weight": 0.37}
    if weight in NAMED[name].LOSSES:
        assert layers.MoE(E, 8, router=name, **arguments).router.loss_weights[weight] == 0.37
        return
    with pytest.raises(ValueError, match=rf"`{weight}_weight` must be None with router='{name}'"):
        layers.MoE(E, 8, router=name, **arguments)


@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("make", [lambda r: r, keras.saving.serialize_keras_object])
def test_an_object_brings_its_own(name, make):
    router = make(NAMED[name](E))
    for argument in ("balance_weight", "z_loss_weight"):
        with pytest.raises(ValueError, match=f"`{argument}` must be None where `router`"):
            layers.MoE(E, 8, router=router, **{argument: 0.0})
    with pytest.raises(ValueError, match="`top_k` must be None, or what the router has"):
        layers.MoE(E, 8, router=router, top_k=4)


@pytest.mark.parametrize(("name", "fixed"), [("switch", 1), ("dense", E), ("uniform", E)])
def test_a_rule_that_fixes_its_top_k(name, fixed):
    assert layers.MoE(E, 8, router=name, top_k=fixed).top_k == fixed
    with pytest.raises(ValueError, match=f"what the router has: top_k={fixed}"):
        layers.MoE(E, 8, router=name, top_k=3)


DESCRIPTIONS = {
    "hidden_dim": 8,
    "output_dim": 8,
    "activation": "tanh",
    "use_bias": False,
    "dropout": 0.1,
    "kernel_initializer": "zeros",
    "bias_initializer": "ones",
    "kernel_regularizer": "l2",
    "bias_regularizer": "l2",
    "kernel_constraint": "non_neg",
    "bias_constraint": "non_neg",
}


@pytest.mark.parametrize("layer", [layers.MoE, layers.SwitchFFN, layers.SoftMoE])
@pytest.mark.parametrize("argument", DESCRIPTIONS)
def test_experts_are_described_once(layer, argument):
    """By what they are, or by the layer that makes them."""
    for make in (lambda: keras.layers.Dense(D), lambda: layers.ExpertMLP(E, [8, D])):
        experts = make()
        with pytest.raises(ValueError, match=f"`{argument}` must be") as error:
            layer(E, experts=experts, **{argument: DESCRIPTIONS[argument]})
        assert "Received: " in str(error.value)
        layer(E, experts=experts)  # corrected, with the same experts
        copy = layer.from_config(layer(E, experts=make()).get_config())
        assert copy.activation is layer(E, 8).activation
