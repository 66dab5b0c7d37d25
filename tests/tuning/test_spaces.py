"""Spaces give arguments that layers take, for every sample, narrowed or not."""

import itertools

import keras_tuner
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_moe import layers, tuning

pytestmark = pytest.mark.one_backend("arithmetic on configurations")

many = settings(deadline=None, max_examples=60, derandomize=True)
seeds = st.integers(0, 2**16)
experts_choices = st.lists(st.sampled_from([1, 2, 3, 4, 8]), min_size=1, max_size=4)
top_k_choices = st.lists(st.sampled_from([2, 4, 8, 16]), max_size=3).map(lambda ks: [1, *ks])
router_choices = st.lists(st.sampled_from(["top_k", "switch", "dense"]), min_size=1, max_size=3)


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
    if arguments["router"] == "top_k":
        assert layer.top_k == arguments["top_k"] and arguments["top_k"] in top_k
    else:
        assert "top_k" not in arguments
    if arguments["router"] == "dense":
        assert not {"capacity_factor", "eval_capacity_factor", "balance_weight"} & set(arguments)
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
    active = (layer.top_k + layer.num_shared_experts) * layer.hidden_dim
    assert abs(active - 240) <= (layer.top_k + shared) / 2


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
    (moe, {"router": "topk"}, r"`router` must be one of \['dense', 'switch', 'top_k'\]"),
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
