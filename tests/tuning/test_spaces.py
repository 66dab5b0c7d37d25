"""Spaces give arguments that layers take, for every sample, narrowed or not."""

import itertools

import keras_tuner
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_moe import layers, tuning
from keras_moe.routers.registry import NAMED_ROUTERS

pytestmark = pytest.mark.one_backend("arithmetic on configurations")

many = settings(deadline=None, max_examples=60, derandomize=True)
seeds = st.integers(0, 2**16)
experts_choices = st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=4)
top_k_choices = st.lists(st.sampled_from([2, 4, 8, 16]), max_size=3).map(lambda ks: [1, *ks])
router_choices = st.lists(st.sampled_from(sorted(NAMED_ROUTERS)), min_size=1, max_size=3)


def sampled(space, seed):
    """Fills a space with random values the way KerasTuner's oracles do, and draws from it."""
    oracle = keras_tuner.oracles.RandomSearchOracle(seed=seed + 1)
    declared = oracle.get_space()
    space(declared)
    oracle.update_space(declared)
    hp = oracle.get_space()
    hp.values = oracle._random_values()
    hp.ensure_active_values()
    return hp, space(hp)


def rule_of(layer):
    """The name of a layer's router."""
    return next(name for name, kind in NAMED_ROUTERS.items() if type(layer.router) is kind)


def names(space):
    hp = keras_tuner.HyperParameters()
    space(hp)
    return {each.name for each in hp.space}


@many
@given(seed=seeds, experts=experts_choices, top_k=top_k_choices, router=router_choices)
def test_every_sample_of_moe_space_is_a_layer(seed, experts, top_k, router):
    def space(hp):
        return tuning.moe_space(
            hp,
            "block",
            num_experts=experts,
            top_k=top_k,
            router=router,
            hidden_dim=(8, 16),
            capacity_factor=(None, 1.25, 3.0),
        )

    hp, arguments = sampled(space, seed)
    layer = layers.MoE(**arguments)
    assert layer.num_experts in experts
    assert 1 <= layer.top_k <= layer.num_experts
    rule = rule_of(layer)
    assert rule in router
    assert ("top_k" in arguments) == (rule not in ("switch", "dense", "uniform"))
    if "top_k" in arguments:
        assert layer.router.get_config()["top_k"] == arguments["top_k"] in top_k
    if rule in ("dense", "dselect_k", "expert_choice", "relu", "uniform"):
        assert not {"capacity_factor", "eval_capacity_factor"} & set(arguments)
    elif layer.capacity_factor is None:
        assert "eval_capacity_factor" not in arguments
    else:
        assert layer.eval_capacity_factor == {1.25: 2.0, 3.0: 3.0}[layer.capacity_factor]
    # The same layer from what a tuner saves.
    saved = keras_tuner.HyperParameters.from_config(hp.get_config())
    assert space(saved) == arguments


@many
@given(seed=seeds, experts=experts_choices, router=router_choices, shared=st.sampled_from([0, 1]))
def test_active_hidden_dim_holds_the_cost(seed, experts, router, shared):
    _, arguments = sampled(
        lambda hp: tuning.moe_space(
            hp,
            "block",
            num_experts=experts,
            top_k=(1, 2, 4),
            router=router,
            num_shared_experts=shared,
            active_hidden_dim=240,
        ),
        seed,
    )
    layer = layers.MoE(**arguments)
    chosen = layer.router.experts_per_token + shared
    assert abs(chosen * layer.hidden_dim - 240) <= chosen / 2


@many
@given(seed=seeds)
def test_every_sample_of_the_other_spaces_is_a_layer(seed):
    _, soft = sampled(lambda hp: tuning.soft_moe_space(hp, "soft", num_slots=(64, 49)), seed)
    layer = layers.SoftMoE(**soft)
    assert abs(layer.num_experts * layer.slots_per_expert - 56) <= 8 + layer.num_experts / 2
    _, gated = sampled(
        lambda hp: tuning.mmoe_space(hp, "gated", expert_units=[(16, 8), 8, (4,)]), seed
    )
    mmoe = layers.MMoE(**gated, tasks=2)
    assert mmoe.expert_units in {(16, 8), (8,), (4,)}
    _, constant = sampled(lambda hp: tuning.mmoe_space(hp, "constant", total_units=128), seed)
    assert constant["num_experts"] * constant["expert_units"] == 128


@pytest.mark.parametrize(
    "space", [tuning.moe_space, tuning.soft_moe_space, tuning.mmoe_space], ids=lambda s: s.__name__
)
def test_two_layers_never_collide_and_the_first_choice_is_the_default(space):
    hp = keras_tuner.HyperParameters()
    first = space(hp, "block_1", num_experts=(4, 2, 8))
    second = space(hp, "block_2", num_experts=(8, 4))
    assert (first["num_experts"], second["num_experts"]) == (4, 8)
    hp.values["block_1/num_experts"] = 2
    assert space(hp, "block_2", num_experts=(8, 4)) == second
    assert all(each.name.startswith(("block_1/", "block_2/")) for each in hp.space)
    with hp.name_scope("model"):
        assert space(hp, "block_1", num_experts=(4, 2, 8))["num_experts"] == 4


def test_fixed_values_stay_out_of_the_search():
    fixed = {"num_experts": 4, "top_k": 2, "hidden_dim": [8], "balance_weight": 0.01}
    assert names(lambda hp: tuning.moe_space(hp, "a", **fixed)) == {"a/capacity_factor"}
    assert names(lambda hp: tuning.moe_space(hp, "a", **fixed, capacity_factor=None)) == set()
    assert names(lambda hp: tuning.soft_moe_space(hp, "a", num_experts=4, hidden_dim=8)) == set()
    assert names(lambda hp: tuning.mmoe_space(hp, "a", num_experts=4, expert_units=[(8, 4)])) == {
        "a/gate_dropout"
    }
    arguments = tuning.mmoe_space(keras_tuner.HyperParameters(), "a", expert_units=[(8, 4)])
    assert arguments["expert_units"] == (8, 4)


OWN = {
    "batch_priority": {"importance", "load"},
    "dselect_k": {"gamma", "entropy"},
    "noisy_top_k": {"importance", "load"},
    "sigmoid_bias": {"bias_update_rate"},
}
WITH_BALANCE = {"top_k", "switch", "no_token_left"}
NO_TOP_K = {"switch", "dense", "uniform"}
NO_CAPACITY = {"dense", "dselect_k", "expert_choice", "relu", "uniform"}


@pytest.mark.parametrize("rule", sorted(NAMED_ROUTERS))
def test_a_router_has_what_it_has_a_use_for(rule):
    expected = {"num_experts", "hidden_dim", *OWN.get(rule, ())}
    expected |= set() if rule in NO_TOP_K else {"top_k"}
    expected |= set() if rule in NO_CAPACITY else {"capacity_factor"}
    expected |= {"balance_weight"} if rule in WITH_BALANCE else set()
    assert names(lambda hp: tuning.moe_space(hp, "a", router=rule)) == {
        f"a/{argument}" for argument in expected
    }
    other = "switch" if rule == "top_k" else "top_k"
    several = names(lambda hp: tuning.moe_space(hp, "a", router=(other, rule)))
    assert {f"a/{rule}/{argument}" for argument in expected} <= several
    # The default is the router's own, the paper's.
    default = layers.MoE(**tuning.moe_space(keras_tuner.HyperParameters(), "a", router=rule))
    named = NAMED_ROUTERS[rule](8, **({} if rule in NO_TOP_K else {"top_k": 2}))
    left_out = {"name", "trainable", "seed", "capacity_factor", "eval_capacity_factor"}
    configs = [router.get_config().items() for router in (default.router, named)]
    assert [(k, v) for k, v in configs[0] if k not in left_out] == [
        (k, v) for k, v in configs[1] if k not in left_out
    ]


def test_a_routers_own_arguments_are_searched_or_fixed():
    def space(hp):
        return tuning.moe_space(
            hp,
            "a",
            num_experts=8,
            top_k=2,
            hidden_dim=8,
            router=("sinkhorn", "sigmoid_bias", "no_token_left"),
            router_arguments={
                "sinkhorn": {"iterations": (4, 2), "jitter": 0.1},
                "sigmoid_bias": {"bias_update_rate": 0.5, "sequence_balance": (0.0, 0.1)},
                "no_token_left": {"rounds": 3},
            },
            capacity_factor=(None, 1.5),
            balance_weight=0.25,
        )

    hp = keras_tuner.HyperParameters()
    router = layers.MoE(**space(hp)).router
    assert (router.iterations, router.jitter, router.top_k) == (4, 0.1, 2)
    assert set(names(space)) == {
        "a/router",
        "a/sinkhorn/iterations",
        "a/sinkhorn/capacity_factor",
        "a/sigmoid_bias/sequence_balance",
        "a/sigmoid_bias/capacity_factor",
    }
    hp.values["a/router"] = "sigmoid_bias"
    hp.ensure_active_values()
    hp.values["a/sigmoid_bias/sequence_balance"] = 0.1
    first, second = (layers.MoE(**space(hp)) for _ in range(2))  # a config, not an object
    assert first.router is not second.router
    assert first.router.bias_update_rate == 0.5
    assert first.router.loss_weights["sequence_balance"] == 0.1
    assert first.router.loss_weights["balance"] == 0.0
    hp.values["a/router"] = "no_token_left"
    hp.ensure_active_values()
    layer = layers.MoE(**space(hp))
    assert (layer.router.rounds, layer.router.loss_weights["balance"]) == (3, 0.25)
    assert layer.capacity_factor == layer.router.capacity_factor == 1.5
    assert layer.eval_capacity_factor == layer.router.eval_capacity_factor == 2.0


def test_experts_too_few_for_every_top_k_have_their_own():
    def space(hp):
        return tuning.moe_space(hp, "a", num_experts=(8, 2, 1), top_k=(4, 2, 1), hidden_dim=8)

    hp = keras_tuner.HyperParameters()
    assert space(hp)["top_k"] == 4
    assert "a/top_k_up_to_2" in names(space)
    assert "a/top_k_up_to_1" not in names(space)  # no choice is left
    hp.values["a/num_experts"] = 2
    hp.ensure_active_values()
    assert space(hp)["top_k"] == hp.values["a/top_k_up_to_2"]
    hp.values["a/num_experts"] = 1
    assert space(hp)["top_k"] == 1


def test_a_space_in_an_inactive_scope_is_declared_and_empty():
    hp = keras_tuner.HyperParameters()
    hp.Choice("kind", ["dense", "moe"])
    with hp.conditional_scope("kind", ["moe"]):
        arguments = tuning.moe_space(hp, "a", num_experts=(8, 2), top_k=(1, 2, 4))
    assert arguments == {}
    assert {"a/num_experts", "a/top_k", "a/top_k_up_to_2"} <= {each.name for each in hp.space}
    assert not any(name.startswith("a/") for name in hp.values)


@pytest.mark.parametrize("router", ["top_k", ("top_k", "dense")])
def test_grid_search_meets_every_combination_once(router, tmp_path):
    """KerasTuner's grid takes hyperparameters of one name for one, whatever their conditions."""
    met = []

    class Grid(keras_tuner.GridSearch):
        def run_trial(self, trial, **_):
            arguments = tuning.moe_space(
                trial.hyperparameters,
                "a",
                num_experts=(4, 1, 2),
                top_k=(2, 1, 4),
                router=router,
                hidden_dim=8,
                capacity_factor=None,
                balance_weight=0.01,
            )
            layer = layers.MoE(**arguments)
            met.append((arguments["router"], layer.num_experts, layer.top_k))
            return 0.0

    Grid(directory=tmp_path, project_name="grid").search(verbose=0)
    sparse = [("top_k", e, k) for e, k in itertools.product((4, 1, 2), (2, 1, 4)) if k <= e]
    dense = [("dense", e, e) for e in (4, 1, 2)] if router != "top_k" else []
    assert sorted(met) == sorted(sparse + dense)


def test_a_users_own_hyperparameter_takes_the_place_of_a_choice():
    hp = keras_tuner.HyperParameters()
    hp.Float("a/balance_weight", 0.002, 0.003, default=0.0025)
    assert tuning.moe_space(hp, "a")["balance_weight"] == 0.0025
    hp.Fixed("b/num_experts", 6)
    with pytest.raises(ValueError, match=r"`b/num_experts` must be one of .* num_experts=6"):
        tuning.moe_space(hp, "b", num_experts=(8, 2), top_k=(2, 4))


moe, soft, mmoe = tuning.moe_space, tuning.soft_moe_space, tuning.mmoe_space
BAD = [
    (moe, {"num_experts": 0}, "`num_experts` must be a positive integer. Received: num_experts=0"),
    (soft, {"num_experts": (4, 0)}, "`num_experts` must be a positive .* num_experts=0"),
    (mmoe, {"num_experts": -1}, "`num_experts` must be a positive integer"),
    (moe, {"num_experts": ()}, r"`num_experts` must be .* at least one .* num_experts=\(\)"),
    (soft, {"hidden_dim": []}, r"`hidden_dim` must be a value, .* hidden_dim=\[\]"),
    (moe, {"hidden_dim": 0}, "`hidden_dim` must be a positive integer"),
    (moe, {"num_experts": (8, 2), "top_k": (4, 8)}, r"`top_k` must have a choice .* not above"),
    (moe, {"top_k": 0}, "`top_k` must be a positive integer"),
    (moe, {"router": "topk"}, r"`router` must be one of \['batch_priority', 'dense', "),
    (
        moe,
        {"router_arguments": {"sinkhorn": {"iterations": 4}}},
        r"`router_arguments` must be a dict of routers, of \['top_k'\], to dicts",
    ),
    (
        moe,
        {"router_arguments": {"top_k": {"balance": 4}}},
        "`router_arguments` must leave out what the space has .* Received: top_k='balance'",
    ),
    (moe, {"router_arguments": {"top_k": {"iterations": 4}}}, "iterations"),
    (moe, {"router": "relu", "active_hidden_dim": 15}, "`active_hidden_dim` must be at least 16"),
    (moe, {"hidden_dim": 8, "active_hidden_dim": 8}, "`hidden_dim` must be None where"),
    (moe, {"active_hidden_dim": 2, "top_k": 4}, "`active_hidden_dim` must be at least 4"),
    (moe, {"capacity_factor": (None, 0)}, "`capacity_factor` must be a number above 0"),
    (moe, {"eval_capacity_factor": 0}, "`eval_capacity_factor` must be a number above 0"),
    (moe, {"balance_weight": -1}, "`balance_weight` must be a number of at least 0"),
    (moe, {"dropout": (0, 1)}, r"`dropout` must be a number in \[0, 1\)"),
    (soft, {"num_slots": 8, "num_experts": 16}, "`num_slots` must be at least 16"),
    (soft, {"num_slots": 8, "slots_per_expert": 2}, "`slots_per_expert` must be None where"),
    (mmoe, {"expert_units": [(8, 0)]}, "`expert_units` must be a positive integer"),
    (mmoe, {"total_units": 4, "num_experts": 8}, "`total_units` must be at least 8"),
    (mmoe, {"total_units": 64, "expert_units": 8}, "`expert_units` must be None where"),
    (mmoe, {"gate_dropout": 1.0}, r"`gate_dropout` must be a number in \[0, 1\)"),
]


@pytest.mark.parametrize(("space", "arguments", "message"), BAD)
def test_bad_arguments(space, arguments, message):
    with pytest.raises(ValueError, match=message):
        space(keras_tuner.HyperParameters(), "a", **arguments)


def test_the_name_is_a_string():
    with pytest.raises(ValueError, match=r"`name` must be a string. Received: name=3"):
        tuning.moe_space(keras_tuner.HyperParameters(), 3)
