"""Every layer equals its float64 oracle: outputs, routing, losses and every gradient.

The scalar that is differentiated is sum(outputs * random cotangent) + the layer's losses, with
coefficients large enough for the losses to show. Relative tolerance 1e-5 of each array's largest
entry, on every backend.
"""

import keras
import numpy as np
import pytest

from keras_moe import layers, routers
from keras_moe.dispatch import PaddedBlocksDispatcher
from tests import helpers
from tests.oracle import expert_mlp, mmoe, moe, soft_moe

LOSSES = {"balance_weight": 0.7, "z_loss_weight": 0.3}
ROUTER_LOSSES = {"balance": 0.7, "z_loss": 0.3}


def gelu_tanh(x):
    return keras.activations.gelu(x, approximate=True)


ACTIVATIONS = {
    "relu": "relu",
    "gelu": "gelu",
    "silu": "silu",
    "linear": None,
    "gelu_tanh": gelu_tanh,
}


def inputs_of(shape, seed):
    x = np.random.default_rng(seed).normal(size=shape).astype("float32")
    x[..., 0] = 1.0  # a constant feature, by which `skew` can turn the router
    return x


def skew_router(layer, skew, feature_size=1.0):
    """Makes experts popular (+) or empty (-) through the constant feature."""
    kernel = np.array(keras.ops.convert_to_numpy(layer.router.kernel))
    for expert, push in skew.items():
        kernel[0, expert] = push * feature_size
    layer.router.kernel.assign(kernel)


def ragged_mask(shape, seed):
    """A mask of rows of different lengths, none of which is the whole row or empty."""
    lengths = np.random.default_rng(seed).integers(1, shape[-1], size=shape[:-1])
    return np.arange(shape[-1]) < lengths[..., None]


def check_moe(
    arguments,
    settings,
    shape=(3, 5, 4),
    mask=None,
    skew=None,
    training=False,
    seed=0,
    layer_class=layers.MoE,
):
    """Builds the layer, runs oracle and layer on the same numbers, and returns both results."""
    activation = arguments.pop("activation", "gelu")
    weights = {k: arguments.get(k, v) for k, v in LOSSES.items()}
    is_object = isinstance(arguments.get("router"), routers.Router)  # brings its own
    asked = {**({} if is_object else weights), **arguments}
    layer = layer_class(**asked, activation=ACTIVATIONS[activation])
    layer.build((None, *shape[1:]))
    helpers.randomize_weights(layer, seed)
    if skew:
        skew_router(layer, skew)
    x = inputs_of(shape, seed + 1)
    cotangent = np.random.default_rng(seed + 2).normal(
        size=(*shape[:-1], arguments.get("output_dim") or shape[-1])
    )
    cotangent = cotangent.astype("float32")
    call = {"training": training, "return_routing": True}
    if mask is not None:
        call["mask"] = mask
        x[~mask] = 7.5  # what padding holds is nobody's business
    (outputs, routing), losses, gradients = helpers.values_and_gradients(
        layer, x, cotangent, lambda result: result[0], **call
    )
    expected = moe.run(
        x,
        helpers.weights_of(layer),
        cotangent,
        mask,
        activation=activation,
        **{**weights, **settings},
    )

    top_k, num_experts = expected.decision_experts.shape[-1], layer.num_experts
    chosen = routing.experts.reshape(-1, top_k)
    kept = expected.kept
    if layer.routing_level == "example":
        kept = kept.reshape(shape[0], -1, top_k).any(axis=1)
    np.testing.assert_array_equal(chosen, expected.decision_experts)
    np.testing.assert_array_equal(routing.kept.reshape(-1, top_k), kept)
    np.testing.assert_array_equal(routing.load, expected.load)
    helpers.assert_all_close(
        {
            "weights": routing.weights.reshape(-1, top_k),
            "logits": routing.logits.reshape(-1, num_experts),
            "balance": routing.losses["balance"],
            "z_loss": routing.losses["z_loss"],
            "loss": np.sum(losses),
            "outputs": outputs,
        },
        {
            "weights": expected.decision_weights,
            "logits": expected.decision_logits,
            "balance": expected.balance,
            "z_loss": expected.z_loss,
            "loss": expected.loss,
            "outputs": expected.outputs,
        },
    )
    expected_gradients = expected.gradients
    if not layer.num_shared_experts:
        expected_gradients = {
            k: v for k, v in expected_gradients.items() if not k.startswith("shared_experts")
        }
    helpers.assert_all_close(gradients, expected_gradients)
    return layer, expected


DISPATCHERS = {
    "walk": {"dispatch": "walk"},
    "blocks_of_1": {"dispatch": PaddedBlocksDispatcher(block_size=1)},
    "blocks_of_3": {"dispatch": PaddedBlocksDispatcher(block_size=3)},
    "blocks_of_8": {"dispatch": PaddedBlocksDispatcher(block_size=8)},
    "dense": {"dispatch": "dense"},
    "lookup": {"dispatch": "lookup"},
    "grouped": {"dispatch": "grouped"},
    "einsum_0.5": {"capacity_factor": 0.5, "dispatch": "einsum"},
    "capacity_0.5": {"capacity_factor": 0.5},
    "capacity_1.0": {"capacity_factor": 1.0},
    "capacity_1.25": {"capacity_factor": 1.25, "dispatch": "slots"},
}
if keras.backend.backend() == "tensorflow":
    del DISPATCHERS["grouped"]  # it has none
MAIN_DISPATCHERS = ["walk", "dense", "capacity_1.0"]


def dispatched(name):
    """Constructor arguments of a dispatcher, and what the oracle must know of it."""
    arguments = dict(DISPATCHERS[name])
    return arguments, {
        key: arguments[key] for key in ("capacity_factor", "capacity_group") if key in arguments
    }


@pytest.mark.parametrize(
    ("dispatcher", "top_k"),
    [
        *((dispatcher, 2) for dispatcher in DISPATCHERS),
        *((c, k) for k in (1, 3) for c in MAIN_DISPATCHERS),
    ],
)
def test_moe_top_k(dispatcher, top_k):
    arguments, settings = dispatched(dispatcher)
    arguments |= {"num_experts": 5, "hidden_dim": 6, "top_k": top_k}
    _, result = check_moe(arguments, {"top_k": top_k, **settings}, seed=top_k)
    if dispatcher.endswith("_0.5"):
        assert not result.kept.all()


@pytest.mark.parametrize(("dispatcher", "top_k"), [("walk", 3), ("dense", 1), ("capacity_1.0", 3)])
def test_moe_not_normalized(dispatcher, top_k):
    arguments, settings = dispatched(dispatcher)
    router = routers.TopKRouter(5, top_k, normalize=False, losses=ROUTER_LOSSES)
    arguments |= {"num_experts": 5, "hidden_dim": 6, "router": router}
    check_moe(arguments, {"top_k": top_k, "normalize": False, **settings}, seed=4)


@pytest.mark.parametrize("dispatcher", MAIN_DISPATCHERS)
def test_moe_dense_router(dispatcher):
    arguments, settings = dispatched(dispatcher)
    arguments |= {"num_experts": 3, "hidden_dim": 6, "router": "dense"}
    settings |= {"top_k": 3, "normalize": False, "balance_weight": 0.0}
    check_dense_router(arguments, settings)


def check_dense_router(arguments, settings):
    """The order of a dense router's choices is that of the experts, not of their probabilities."""
    layer = layers.MoE(z_loss_weight=LOSSES["z_loss_weight"], **arguments)
    layer.build((None, 5, 4))
    helpers.randomize_weights(layer, 5)
    x, cotangent = inputs_of((3, 5, 4), 6), inputs_of((3, 5, 4), 7)
    outputs, losses, gradients = helpers.values_and_gradients(layer, x, cotangent)
    expected = moe.run(
        x,
        helpers.weights_of(layer),
        cotangent,
        **{**LOSSES, **settings, "capacity_factor": None},
    )
    # All loads are N, which any factor of at least 1 holds, whatever the order of choices.
    assert len(losses) == 1  # the z-loss alone
    helpers.assert_close(outputs, expected.outputs, "outputs")
    helpers.assert_close(np.sum(losses), expected.loss, "loss")
    helpers.assert_all_close(gradients, expected.gradients)


def test_moe_switch_router():
    arguments, settings = dispatched("walk")
    arguments |= {"num_experts": 5, "hidden_dim": 6, "router": "switch"}
    check_moe(arguments, {"top_k": 1, **settings}, seed=8)


@pytest.mark.parametrize(
    ("dispatcher", "activation"),
    [("walk", "silu"), ("dense", "gelu_tanh"), ("capacity_1.0", "silu")],
)
def test_moe_glu(dispatcher, activation):
    arguments, settings = dispatched(dispatcher)
    arguments |= {"num_experts": 5, "hidden_dim": 6, "experts": "glu", "activation": activation}
    layer, _ = check_moe(arguments, settings, seed=9)
    assert "experts/gate_bias_0" in helpers.weights_of(layer)


@pytest.mark.parametrize("activation", ["relu", "silu", "linear", "gelu_tanh"])
def test_moe_activation(activation):
    arguments = {"num_experts": 3, "hidden_dim": 5, "activation": activation, "dispatch": "dense"}
    check_moe(arguments, {}, (2, 3, 4), seed=10)


def test_moe_without_bias():
    arguments, settings = dispatched("walk")
    arguments |= {"num_experts": 4, "hidden_dim": 6, "experts": "glu", "use_bias": False}
    layer, _ = check_moe(arguments, settings, seed=11)
    assert not any("bias" in path for path in helpers.weights_of(layer))


@pytest.mark.parametrize(
    ("dispatcher", "experts"), [("walk", "mlp"), ("dense", "glu"), ("capacity_1.0", "mlp")]
)
def test_moe_shared_experts_and_output_dim(dispatcher, experts):
    arguments, settings = dispatched(dispatcher)
    arguments |= {
        "num_experts": 4,
        "hidden_dim": 5,
        "experts": experts,
        "num_shared_experts": 2,
        "output_dim": 7,
    }
    check_moe(arguments, settings, seed=12)


@pytest.mark.parametrize(
    ("dispatcher", "shared"),
    [
        ("walk", 1),
        ("blocks_of_3", 0),
        ("lookup", 0),
        ("dense", 0),
        ("capacity_0.5", 1),
        ("einsum_0.5", 0),
    ],
)
def test_moe_masked(dispatcher, shared):
    arguments, settings = dispatched(dispatcher)
    arguments |= {"num_experts": 4, "hidden_dim": 5, "num_shared_experts": shared}
    mask = ragged_mask((4, 6), 13)
    _, result = check_moe(arguments, settings, (4, 6, 4), mask, seed=14)
    assert result.load.sum() == 2 * mask.sum()
    if dispatcher.endswith("_0.5"):
        assert result.kept.sum() < 2 * mask.sum()


@pytest.mark.parametrize(
    ("factor", "masked", "dispatch"),
    [
        (0.5, False, "auto"),
        (0.5, True, "auto"),
        (1.0, True, "auto"),
        (0.5, True, "einsum"),
    ],
)
def test_moe_capacity_group_example(factor, masked, dispatch):
    arguments = {
        "dispatch": dispatch,
        "num_experts": 3,
        "hidden_dim": 5,
        "capacity_factor": factor,
        "capacity_group": "example",
    }
    settings = {"capacity_factor": factor, "capacity_group": "example"}
    mask = ragged_mask((4, 7), 15) if masked else None
    _, result = check_moe(arguments, settings, (4, 7, 4), mask, {0: 2.0}, seed=16)
    if factor == 0.5:
        assert result.kept.sum() < result.load.sum()


@pytest.mark.parametrize(
    ("dispatcher", "masked"),
    [("walk", True), ("capacity_0.5", True), ("dense", False), ("capacity_1.0", False)],
)
def test_moe_routing_level_example(dispatcher, masked):
    arguments, settings = dispatched(dispatcher)
    arguments |= {"num_experts": 4, "hidden_dim": 5, "routing_level": "example"}
    mask = None
    if masked:
        mask = ragged_mask((5, 4), 17)
        mask[2] = False  # an example of padding alone
    settings["routing_level"] = "example"
    check_moe(arguments, settings, (5, 4, 4), mask, seed=18)


@pytest.mark.parametrize(
    ("shape", "dispatcher", "masked"),
    [
        ((7, 4), "walk", False),
        ((7, 4), "capacity_0.5", True),
        ((2, 3, 2, 4), "walk", True),
        ((2, 3, 2, 4), "capacity_1.0", False),
    ],
)
def test_moe_any_rank(shape, dispatcher, masked):
    arguments, settings = dispatched(dispatcher)
    arguments |= {"num_experts": 4, "hidden_dim": 5}
    mask = ragged_mask(shape[:-1], 20) if masked else None
    check_moe(arguments, settings, shape, mask, seed=21)


def test_moe_capacity_group_example_of_rank_4():
    arguments = {
        "num_experts": 3,
        "hidden_dim": 5,
        "capacity_factor": 0.75,
        "capacity_group": "example",
    }
    settings = {"capacity_factor": 0.75, "capacity_group": "example"}
    check_moe(arguments, settings, (2, 3, 2, 4), seed=22)


SKEWS = {
    "one_takes_all": (1, {2: 30.0}),
    "two_are_empty": (2, {0: -30.0, 3: -30.0}),
    "one_is_everybodys_second": (2, {0: 20.0, 1: 10.0}),
}


@pytest.mark.parametrize("skew", SKEWS)
@pytest.mark.parametrize("dispatcher", ["walk", "blocks_of_3", "capacity_0.5"])
def test_moe_skewed_routing(skew, dispatcher):
    top_k, push = SKEWS[skew]
    arguments, settings = dispatched(dispatcher)
    arguments |= {"num_experts": 5, "hidden_dim": 5, "top_k": top_k, "z_loss_weight": 1e-3}
    settings |= {"top_k": top_k, "z_loss_weight": 1e-3}
    _, result = check_moe(arguments, settings, (17, 4), skew=push, seed=23)
    if skew == "two_are_empty":
        assert result.load[0] == result.load[3] == 0
    else:
        assert result.load.max() == 17


@pytest.mark.parametrize(
    ("dispatcher", "shape"),
    [
        ("walk", (1, 4)),
        ("dense", (1, 1, 4)),
        ("capacity_1.0", (1, 4)),
        ("capacity_1.0", (3, 4)),
        ("blocks_of_8", (3, 4)),
        ("walk", (13, 4)),
    ],
)
def test_moe_few_tokens_many_experts(dispatcher, shape):
    arguments, settings = dispatched(dispatcher)
    arguments |= {"num_experts": 7, "hidden_dim": 3, "top_k": 3}
    check_moe(arguments, {"top_k": 3, **settings}, shape, seed=24)


def test_moe_single_expert():
    arguments, settings = dispatched("walk")
    arguments |= {"num_experts": 1, "hidden_dim": 3, "top_k": 1}
    check_moe(arguments, {"top_k": 1, **settings}, (5, 4), seed=25)


@pytest.mark.parametrize("training", [False, True])
def test_moe_eval_capacity_factor(training):
    arguments = {
        "num_experts": 4,
        "hidden_dim": 3,
        "capacity_factor": 0.5,
        "eval_capacity_factor": 0.9,
    }
    factor = 0.5 if training else 0.9
    check_moe(arguments, {"capacity_factor": factor}, (11, 4), training=training, seed=26)


@pytest.mark.parametrize(("training", "masked"), [(False, True), (True, False)])
def test_switch_ffn(training, masked):
    arguments = {"num_experts": 4, "hidden_dim": 5, "jitter": 0.0, "activation": "relu"}
    settings = {"top_k": 1, "capacity_factor": 1.25 if training else 2.0}
    mask = ragged_mask((3, 6), 27) if masked else None
    _, result = check_moe(
        arguments, settings, (3, 6, 4), mask, {1: 3.0}, training, 28, layers.SwitchFFN
    )
    if not masked:
        assert not result.kept.all()


# === Soft MoE ===


@pytest.mark.parametrize(("per_expert", "experts"), [(1, "mlp"), (2, "glu"), (3, "mlp")])
@pytest.mark.parametrize("masked", [False, True])
def test_soft_moe(per_expert, masked, experts):
    layer = layers.SoftMoE(3, 5, slots_per_expert=per_expert, experts=experts, output_dim=6)
    layer.build((None, None, 4))
    helpers.randomize_weights(layer, 30)
    layer.router.scale.assign(2.3)
    x = np.random.default_rng(31).normal(size=(4, 5, 4)).astype("float32")
    cotangent = np.random.default_rng(32).normal(size=(4, 5, 6)).astype("float32")
    mask = None
    if masked:
        mask = ragged_mask((4, 5), 33)
        mask[1] = False  # a sequence of padding alone
        mask[2] = [False, True, False, True, True]  # padding in between
        x[~mask] = 7.5
    call = {} if mask is None else {"mask": mask}
    (outputs, routing), losses, gradients = helpers.values_and_gradients(
        layer, x, cotangent, lambda result: result[0], return_routing=True, **call
    )
    expected, (dispatch, combine, logits), expected_gradients = soft_moe.run(
        x, helpers.weights_of(layer), cotangent, mask
    )
    assert losses == []
    helpers.assert_close(outputs, expected, "outputs")
    helpers.assert_close(routing.dispatch, dispatch, "dispatch")
    helpers.assert_close(routing.combine, combine, "combine")
    helpers.assert_close(routing.logits, logits, "logits")
    helpers.assert_all_close(gradients, expected_gradients)


@pytest.mark.parametrize("shape", [(3, 4), (2, 5, 4), (2, 3, 2, 4)])
def test_soft_moe_any_rank(shape):
    layer = layers.SoftMoE(3, 5, slots_per_expert=2, activation="silu")
    layer.build((None, *shape[1:]))
    helpers.randomize_weights(layer, 34)
    x = np.random.default_rng(35).normal(size=shape).astype("float32")
    cotangent = np.random.default_rng(36).normal(size=shape).astype("float32")
    sequence = (shape[0], int(np.prod(shape[1:-1])), shape[-1])
    outputs, _, gradients = helpers.values_and_gradients(layer, x, cotangent)
    expected, _, expected_gradients = soft_moe.run(
        x.reshape(sequence),
        helpers.weights_of(layer),
        cotangent.reshape(sequence),
        activation="silu",
    )
    expected_gradients["inputs"] = expected_gradients["inputs"].reshape(shape)
    helpers.assert_close(outputs, expected.reshape(shape), "outputs")
    helpers.assert_all_close(gradients, expected_gradients)


# === MMoE ===


@pytest.mark.parametrize(
    ("tasks", "gate_units"),
    [(1, ()), (3, (5,)), (("like", "click"), ()), (("like", "click"), (5, 3))],
)
@pytest.mark.parametrize("gate_use_bias", [False, True])
def test_mmoe(tasks, gate_units, gate_use_bias):
    arguments = {"tasks": tasks, "gate_units": gate_units, "gate_use_bias": gate_use_bias}
    layer = check_mmoe(arguments, (9, 4))
    assert ("gates/bias" in helpers.weights_of(layer)) == gate_use_bias


@pytest.mark.parametrize("activation", ["gelu", "silu"])
def test_mmoe_activation_is_on_every_layer(activation):
    check_mmoe({"activation": activation, "gate_units": (5,)}, (6, 4), activation)


@pytest.mark.parametrize("shape", [(1, 4), (2, 3, 4), (2, 2, 3, 4)])
@pytest.mark.parametrize("masked", [False, True])
def test_mmoe_any_rank(shape, masked):
    if masked and shape[-2] == 1:
        mask = np.zeros(shape[:-1], bool)
    else:
        mask = ragged_mask(shape[:-1], 40) if masked else None
    check_mmoe({"use_bias": masked}, shape, mask=mask)


def check_mmoe(arguments, shape, activation="relu", mask=None):
    layer = layers.MMoE(**{"num_experts": 4, "expert_units": [6, 5], "tasks": 2, **arguments})
    layer.build((None, *shape[1:]))
    helpers.randomize_weights(layer, 41)
    rng = np.random.default_rng(42)
    x = rng.normal(size=shape).astype("float32")
    cotangents = rng.normal(size=(layer.num_tasks, *shape[:-1], 5)).astype("float32")
    call = {}
    if mask is not None:
        call["mask"], x[~mask] = mask, 7.5
    structure = list(cotangents)
    if not isinstance(layer.tasks, int):
        structure = dict(zip(layer.tasks, cotangents, strict=True))

    def by_task(result):  # trees sort the keys of a dict
        outputs = result[0]
        if isinstance(outputs, dict):
            assert set(outputs) == set(layer.tasks)
            outputs = [outputs[task] for task in layer.tasks]
        return outputs

    (outputs, routing), _, gradients = helpers.values_and_gradients(
        layer, x, list(cotangents), by_task, return_routing=True, **call
    )
    assert type(outputs) is type(structure)
    expected, gates, expected_gradients = mmoe.run(
        x, helpers.weights_of(layer), cotangents, mask, activation=activation
    )
    helpers.assert_close(np.stack(by_task((outputs,))), expected, "outputs")
    helpers.assert_close(routing.weights, gates, "gates")
    helpers.assert_all_close(gradients, expected_gradients)
    return layer


# === The bank itself ===


@pytest.mark.parametrize(
    ("gated", "activate_last", "rows"),
    [
        (False, False, "blocks"),
        (False, True, "blocks"),
        (True, False, "blocks"),
        (True, True, "blocks"),
        (False, False, "own"),
        (True, True, "shared"),
        (False, False, "many shared"),
        (True, True, "many shared"),
    ],
)
def test_expert_mlp(gated, activate_last, rows):
    layer = layers.ExpertMLP(
        3, [5, 4, 6], "silu", gated=gated, activate_last=activate_last, use_bias=not activate_last
    )
    layer.build((3, None, 4))
    helpers.randomize_weights(layer, 50)
    first = {"own": 3, "shared": 1, "many shared": 1, "blocks": 5}[rows]
    count = 515 if rows == "many shared" else 2
    rng = np.random.default_rng(51)
    x = rng.normal(size=(first, count, 4)).astype("float32")
    cotangent = rng.normal(size=(5 if rows == "blocks" else 3, count, 6)).astype("float32")
    call = {"block_experts": np.array([2, 0, 2, 2, 0], "int32")} if rows == "blocks" else {}
    outputs, _, gradients = helpers.values_and_gradients(layer, x, cotangent, **call)
    expected, expected_gradients = expert_mlp.run(
        x,
        helpers.weights_of(layer),
        cotangent,
        activation="silu",
        activate_last=activate_last,
        **call,
    )
    helpers.assert_close(outputs, expected, "outputs")
    helpers.assert_all_close(gradients, expected_gradients)


@pytest.mark.parametrize(("count", "rank"), [(511, 3), (512, 2)])
def test_many_shared_rows_are_run_expert_by_expert(count, rank, monkeypatch):
    ranks = []
    matmul = keras.ops.matmul

    def spy(rows, kernel):
        ranks.append(len(kernel.shape))
        return matmul(rows, kernel)

    layer = layers.ExpertMLP(3, [5, 6])
    layer.build((3, None, 4))
    monkeypatch.setattr(keras.ops, "matmul", spy)
    helpers.call(layer, np.zeros((1, count, 4), "float32"))
    assert ranks == [rank] * (2 if rank == 3 else 2 * 3)


# === Keras layers as experts ===


@pytest.mark.parametrize(
    ("dispatcher", "kind"),
    [("blocks_of_3", "template"), ("dense", "list"), ("capacity_0.5", "template")],
)
def test_moe_of_keras_layers(kind, dispatcher):
    """A bank of `Dense` experts equals the oracle's bank of one linear layer."""
    arguments, settings = dispatched(dispatcher)
    experts = keras.layers.Dense(4)
    if kind == "list":
        experts = [keras.layers.Dense(4) for _ in range(3)]
    layer = layers.MoE(3, experts=experts, **LOSSES, **arguments)
    layer.build((None, None, 4))
    helpers.randomize_weights(layer, 60)
    x, cotangent = inputs_of((2, 5, 4), 61), inputs_of((2, 5, 4), 62)
    outputs, losses, gradients = helpers.values_and_gradients(layer, x, cotangent)

    def stacked(by_path):
        banks = {
            f"experts/{name}_0": np.stack(
                [
                    value
                    for path, value in by_path.items()
                    if path.startswith("experts/") and path.endswith(f"/{name}")
                ]
            )
            for name in ("kernel", "bias")
        }
        return {"router/kernel": by_path["router/kernel"], **banks}

    expected = moe.run(x, stacked(helpers.weights_of(layer)), cotangent, **LOSSES, **settings)
    helpers.assert_close(outputs, expected.outputs, "outputs")
    helpers.assert_close(np.sum(losses), expected.loss, "loss")
    helpers.assert_all_close(
        {**stacked(gradients), "inputs": gradients["inputs"]}, expected.gradients
    )
