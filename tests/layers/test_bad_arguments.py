"""A wrong argument fails in the constructor, with what is expected and what was received."""

import re

import keras
import numpy as np
import pytest

from keras_moe import callbacks, dispatch, layers, routers

pytestmark = pytest.mark.one_backend("checks of Python, before any tensor")

Dense = keras.layers.Dense


def moe(**arguments):
    return layers.MoE(**{"num_experts": 4, "hidden_dim": 8, **arguments})


def soft(**arguments):
    return layers.SoftMoE(**{"num_experts": 4, "hidden_dim": 8, **arguments})


def mmoe(**arguments):
    return layers.MMoE(**{"num_experts": 4, "expert_units": [8], "tasks": 2, **arguments})


BAD = [
    # sizes
    (lambda: moe(num_experts=0), r"`num_experts` must be a positive integer. Received: num_expe"),
    (lambda: moe(num_experts=-3), "`num_experts` must be a positive .* Received: num_experts=-3"),
    (lambda: moe(num_experts=2.0), "`num_experts` must be .* Received: num_experts=2.0"),
    (lambda: moe(num_experts=True), "`num_experts` must be .* Received: num_experts=True"),
    (lambda: moe(hidden_dim=0), "`hidden_dim` must be .* Received: hidden_dim=0"),
    (lambda: moe(hidden_dim="8"), "`hidden_dim` must be .* Received: hidden_dim='8'"),
    (lambda: moe(hidden_dim=None), "`hidden_dim` must be .* Received: hidden_dim=None"),
    (lambda: moe(output_dim=-1), "`output_dim` must be .* Received: output_dim=-1"),
    (lambda: moe(top_k=9), r"integer between 1 and num_experts=4. Received: top_k=9"),
    (lambda: moe(top_k=0), "`top_k` must be a positive integer. Received: top_k=0"),
    (lambda: moe(router="switch", top_k=-1), "`top_k` must be a positive integer"),
    (lambda: mmoe(gate_units=0), "`gate_units` must be a positive integer"),
    (lambda: moe(seed="abc"), "`seed` must be an integer or None. Received: seed='abc'"),
    (lambda: mmoe(seed=1.5), "`seed` must be an integer or None"),
    (lambda: routers.TopKRouter(4, seed=[1]), "`seed` must be an integer or None"),
    (lambda: moe(num_shared_experts=-1), "`num_shared_experts` must be an integer of at least 0"),
    (lambda: soft(slots_per_expert=0), "`slots_per_expert` must be a positive integer"),
    (lambda: mmoe(expert_units=[]), r"`expert_units` must name at least one .* expert_units=\[\]"),
    (lambda: mmoe(expert_units=[8, 0]), "`expert_units` must be a positive integer"),
    (lambda: mmoe(gate_units=[-1]), "`gate_units` must be a positive integer"),
    # numbers
    (lambda: moe(capacity_factor=0), "`capacity_factor` must be .* Received: capacity_factor=0"),
    (lambda: moe(capacity_factor=float("nan")), "`capacity_factor` must be a number above 0"),
    (lambda: moe(eval_capacity_factor=2.0), "`eval_capacity_factor` needs a `capacity_factor`"),
    (lambda: moe(balance_weight=-1), "`balance_weight` must be a number of at least 0"),
    (lambda: moe(z_loss_weight="big"), "`z_loss_weight` must be a number of at least 0"),
    (lambda: moe(dropout=1.0), r"`dropout` must be a number in \[0, 1\). Received: dropout=1.0"),
    (lambda: mmoe(gate_dropout=-0.1), r"`dropout` must be|`gate_dropout` must be"),
    (lambda: layers.SwitchFFN(4, 8, jitter=2), r"`jitter` must be a number in \[0, 1\)"),
    # names
    (
        lambda: moe(router="topk"),
        r"must be one of \['batch_priority', 'dense', .*\]. Received: router='topk'",
    ),
    (lambda: moe(router=Dense(3)), "`router` must be one of .* or a `Router`"),
    (lambda: moe(router=routers.TopKRouter(5)), "must choose from num_experts=4 .*num_experts=5"),
    (lambda: moe(experts="mpl"), r"`experts` must be one of \['glu', 'mlp'\]"),
    (lambda: moe(experts=3), "`experts` must be one of .* a Keras layer or a list"),
    (lambda: moe(experts=[Dense(2)] * 4), "distinct layers"),
    (lambda: moe(experts=[Dense(2), Dense(2)]), "list of num_experts=4"),
    (lambda: moe(experts=Dense(2), output_dim=3), "`output_dim` must be None"),
    (lambda: moe(dispatch="sort"), r"one of \['auto', 'dense', .* 'slots', 'walk'\]"),
    (lambda: moe(dispatch=3), "`dispatch` must be one of .* or a `Dispatcher`"),
    (lambda: moe(dispatch="slots"), "`dispatch='slots'` needs a `capacity_factor`"),
    (lambda: moe(routing_level="word"), r"`routing_level` must be one of \['example', 'token'\]"),
    (lambda: moe(capacity_group="all"), r"`capacity_group` must be one of \['batch', 'example'\]"),
    (
        lambda: moe(routing_level="example", capacity_group="example", capacity_factor=1.0),
        "`capacity_group` must be 'batch' where `routing_level` is 'example'",
    ),
    (
        lambda: soft(mixing="hard"),
        r"`mixing` must be one of \['identity', 'soft', 'soft_uniform', .*mixing='hard'",
    ),
    (lambda: soft(mixing="identity", causal=True), "`causal` must be False where `mixing` is 'id"),
    (
        lambda: soft(mixing="identity")(np.zeros((2, 5, 8), "float32")),
        "as many tokens as there are slots, .* = 4. Received: tokens=5",
    ),
    (
        lambda: soft(mixing="identity", slots_per_expert=2)(keras.Input((7, 8))),
        "as many tokens as there are slots, .* = 8. Received: tokens=7",
    ),
    (lambda: soft(mixing="identity")(np.zeros((2, 8), "float32")), "Received: tokens=1"),
    (lambda: layers.SwitchFFN(4, 8, top_k=1), "`SwitchFFN` sets `top_k` itself"),
    (lambda: layers.SwitchFFN(4, 8, router="dense"), "`SwitchFFN` sets `router` itself"),
    (lambda: moe(experts=layers.ExpertMLP(3, [8, 6])), "num_experts=4. Received: experts.num_exp"),
    (lambda: [moe(router=router) for router in [routers.TopKRouter(4)] * 2], "one layer only"),
    (lambda: [mmoe(gate=gate) for gate in [routers.SoftmaxGate(4, 2)] * 2], "one layer only"),
    (lambda: mmoe(gate="soft"), r"`gate` must be one of \['softmax', 'sigmoid', 'top_k', "),
    (lambda: mmoe(gate=routers.SoftmaxGate(4, 3)), "`gate` must have num_experts=4, num_tasks=2"),
    (lambda: mmoe(tasks=0), "`tasks` must be a positive integer"),
    (lambda: mmoe(tasks="click"), "a sequence of distinct names. Received: tasks='click'"),
    (lambda: mmoe(tasks={"a": 1}), "a sequence of distinct names"),
    (lambda: moe(router="dense", capacity_factor=0.5), "or at least 1, with a router that sends"),
    (
        lambda: moe(router="uniform", capacity_factor=1.0, eval_capacity_factor=0.5),
        "must be None, or at least 1, with",
    ),
    (lambda: moe().running_counts(), "`MoE` has counts once it is built"),
    (lambda: mmoe().reset_running_counts(), "`MMoE` has counts once it is built"),
    (lambda: mmoe(tasks=["a", "a"]), r"distinct names. Received: tasks=\['a', 'a'\]"),
    (lambda: mmoe(tasks=[]), "distinct names"),
    (lambda: dispatch.PaddedBlocksDispatcher(0), "`block_size` must be a positive integer"),
    (lambda: callbacks.ExpertMonitor(every=0), "`every` must be a positive integer"),
    (lambda: layers.ExpertMLP(4, 8)(np.zeros((3, 2, 8))), r"\(E, C, d\) .*E=4. Received: shape"),
    (lambda: layers.ExpertMLP(4, 8)(np.zeros((2, 8))), "rank 3 or more"),
    (lambda: moe().dispatch_plan(0), "`n_tokens` must be a positive integer"),
]


@pytest.mark.parametrize("make, message", BAD, ids=[message for _, message in BAD])
def test_message(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "Received: " in str(error.value)


def test_what_a_refused_layer_was_given_is_still_free():
    """One of two sublayers belongs to another layer: the other one can be used again."""
    router, bank = routers.TopKRouter(4), layers.ExpertMLP(4, [8, 6])
    moe(experts=bank, hidden_dim=None)
    with pytest.raises(ValueError, match="one layer only"):
        moe(router=router, experts=bank, hidden_dim=None)
    assert moe(router=router).router is router
    dense = [keras.layers.Dense(6) for _ in range(4)]
    layers.LayerExperts([*dense[:3], keras.layers.Dense(6)], 4)
    others = [keras.layers.Dense(6) for _ in range(3)]
    with pytest.raises(ValueError, match="one layer only"):
        layers.LayerExperts([*others, dense[0]], 4)
    assert layers.LayerExperts([*others, dense[3]], 4).num_experts == 4


HAVE_ROUTERS = {
    "MoE": lambda **more: layers.MoE(4, 8, **more),
    "SwitchFFN": lambda **more: layers.SwitchFFN(4, 8, **more),
}
WITHOUT_LOSSES = {
    "SoftMoE": lambda **more: layers.SoftMoE(4, 8, **more),
    "MMoE": lambda **more: layers.MMoE(4, 8, 2, **more),
    "ExpertMLP": lambda **more: layers.ExpertMLP(4, 8, **more),
    "LayerExperts": lambda **more: layers.LayerExperts(Dense(2), 4, **more),
    "SoftRouter": lambda **more: routers.SoftRouter(4, **more),
    "SoftmaxGate": lambda **more: routers.SoftmaxGate(4, 2, **more),
}
LOSSES = sorted({each for rule in vars(routers).values() for each in getattr(rule, "LOSSES", ())})


@pytest.mark.parametrize("loss", [each for each in LOSSES if each not in ("balance", "z_loss")])
@pytest.mark.parametrize("name", HAVE_ROUTERS)
def test_the_coefficient_of_a_loss_belongs_to_the_router(name, loss):
    """The message says what to write, and that works."""
    with pytest.raises(ValueError, match=f"`{name}` has no `{loss}_weight`") as error:
        HAVE_ROUTERS[name](**{f"{loss}_weight": 0.25})
    assert f"Received: {loss}_weight=0.25" in str(error.value)
    call = re.search(r"router=(\w+\(.*?\}\))\)`", str(error.value))[1]
    router = eval(call, {**vars(routers), "num_experts": 4})
    assert layers.MoE(4, 8, router=router).router.loss_weights[loss] == 0.25


@pytest.mark.parametrize("name", [*HAVE_ROUTERS, *WITHOUT_LOSSES])
def test_a_coefficient_of_nothing(name):
    argument = "capacity_weight" if name in HAVE_ROUTERS else "balance_weight"
    why = "no router has that loss" if name in HAVE_ROUTERS else "it has no auxiliary losses"
    with pytest.raises(ValueError, match=f"`{name}` has no `{argument}`: {why}. Received: "):
        {**HAVE_ROUTERS, **WITHOUT_LOSSES}[name](**{argument: 0.5})


class _NotFinite(keras.initializers.Initializer):
    def __call__(self, shape, dtype=None):
        return keras.ops.full(shape, float("nan"), dtype=dtype)


@pytest.mark.parametrize(
    "layer, weight",
    [
        (lambda: moe(kernel_initializer=_NotFinite()), "experts/kernel_0"),
        (lambda: moe(bias_initializer=_NotFinite()), "experts/bias_0"),
        (lambda: moe(kernel_initializer=keras.initializers.Constant(float("inf"))), "kernel_0"),
        (
            lambda: moe(router=routers.TopKRouter(4, kernel_initializer=_NotFinite())),
            "router/kernel",
        ),
        (lambda: soft(phi_initializer=_NotFinite()), "router/phi"),
        (lambda: soft(scale_initializer=_NotFinite()), "router/scale"),
        (lambda: mmoe(gate_initializer=_NotFinite()), "gates/kernel"),
        (lambda: mmoe(kernel_initializer=_NotFinite()), "experts/kernel_0"),
    ],
)
def test_weights_that_are_not_finite(layer, weight):
    with pytest.raises(ValueError, match=rf"{weight}.* must return finite numbers. Received: in"):
        layer().build((None, 3, 8))


def test_a_wrong_layer_in_a_model_names_itself():
    with pytest.raises(ValueError, match="`SoftMoE` expects inputs of rank 2 or more"):
        soft()(keras.Input(()))
