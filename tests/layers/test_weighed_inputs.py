"""`weigh="inputs"`: experts read weight * token, whatever moves the rows (Llama 4)."""

import keras
import numpy as np
import pytest

from keras_moe import dispatch, layers, routers
from tests import contract, helpers
from tests.dispatch.test_expert_choice import slopes_of
from tests.layers.test_values_and_gradients import (
    DISPATCHERS,
    MAIN_DISPATCHERS,
    ROUTER_LOSSES,
    check_dense_router,
    check_moe,
    dispatched,
    inputs_of,
    ragged_mask,
)
from tests.oracle import expert_mlp, losses
from tests.oracle.routers import sigmoid

INPUTS = {"weigh": "inputs"}
NO_LOSSES = {"balance": 0.0, "z_loss": 0.0}


def weighed(dispatcher, **more):
    """Arguments of the layer and of the oracle."""
    arguments, settings = dispatched(dispatcher)
    return {"num_experts": 5, "hidden_dim": 6, **arguments, **INPUTS, **more}, {
        **settings,
        **INPUTS,
    }


@pytest.mark.parametrize(
    ("dispatcher", "top_k"),
    [
        *((dispatcher, 2) for dispatcher in DISPATCHERS),
        *((c, k) for k in (1, 3) for c in MAIN_DISPATCHERS),
    ],
)
def test_equals_the_definition(dispatcher, top_k):
    arguments, settings = weighed(dispatcher, top_k=top_k)
    _, result = check_moe(arguments, {"top_k": top_k, **settings}, seed=top_k)
    if dispatcher.endswith("_0.5"):
        assert not result.kept.all()


@pytest.mark.parametrize("dispatcher", ["walk", "blocks_of_3", "lookup", "dense", "capacity_0.5"])
@pytest.mark.parametrize("kind", ["mlp", "glu"])
def test_masks_and_shared_experts(dispatcher, kind):
    arguments, settings = weighed(
        dispatcher, num_shared_experts=2, experts=kind, activation="silu", output_dim=7
    )
    check_moe(arguments, settings, (4, 6, 4), ragged_mask((4, 6), 13), seed=14)


@pytest.mark.parametrize("dispatch", ["auto", "einsum", "slots", "walk", "dense"])
def test_capacity_of_each_example(dispatch):
    arguments, settings = weighed(
        "capacity_0.5", num_experts=3, capacity_group="example", dispatch=dispatch
    )
    settings["capacity_group"] = "example"
    mask = ragged_mask((4, 7), 15)
    _, result = check_moe(arguments, settings, (4, 7, 4), mask, {0: 2.0}, seed=16)
    assert result.kept.sum() < result.load.sum()


@pytest.mark.parametrize("dispatcher", ["walk", "capacity_0.5"])
def test_examples_as_a_whole(dispatcher):
    arguments, settings = weighed(dispatcher, routing_level="example")
    settings["routing_level"] = "example"
    check_moe(arguments, settings, (5, 4, 4), ragged_mask((5, 4), 17), seed=18)


@pytest.mark.parametrize("dispatcher", MAIN_DISPATCHERS)
def test_a_dense_router(dispatcher):
    arguments, settings = weighed(dispatcher, num_experts=3, router="dense")
    settings |= {"top_k": 3, "normalize": False, "balance_weight": 0.0}
    check_dense_router(arguments, settings)


def test_a_switch_layer_passes_it_on():
    arguments = {"num_experts": 4, "hidden_dim": 5, "jitter": 0.0, "activation": "relu", **INPUTS}
    settings = {"top_k": 1, "capacity_factor": 2.0, "normalize": False, **INPUTS}
    check_moe(arguments, settings, skew={1: 3.0}, seed=28, layer_class=layers.SwitchFFN)


@pytest.mark.one_backend("the equations of the tests above, of another score")
@pytest.mark.parametrize("dispatcher", ["walk", "blocks_of_3", "dense", "capacity_0.5"])
def test_llama_4(dispatcher):
    """out = shared(x) + sum over the chosen of expert(sigmoid(logit) x)."""
    arguments, _ = dispatched(dispatcher)
    router = routers.TopKRouter(4, 1, normalize=False, score="sigmoid", losses=ROUTER_LOSSES)
    layer = layers.MoE(
        4, 6, router=router, experts="glu", num_shared_experts=1, activation="silu",
        **{**arguments, **INPUTS},
    )  # fmt: skip
    layer.build((None, 4))
    helpers.randomize_weights(layer)
    x = inputs_of((9, 4), 3)
    (outputs, routing), _ = helpers.call(layer, x, return_routing=True)
    weights = helpers.weights_of(layer)
    bank, shared = (expert_mlp.bank_of(weights, name) for name in ("experts", "shared_experts"))
    expected = []
    for n, row in enumerate(x.astype("float64")):
        scores = sigmoid(row @ weights["router/kernel"])
        y = expert_mlp.forward(shared, 0, row, "silu")[0]
        e = int(np.argmax(scores))
        if routing.kept[n, 0]:
            y = y + expert_mlp.forward(bank, e, scores[e] * row, "silu")[0]
        expected.append(y)
    helpers.assert_close(outputs, np.array(expected), "outputs")


@pytest.mark.parametrize("kind", ["template", "list"])
@pytest.mark.parametrize("dispatcher", ["blocks_of_3", "dense", "capacity_0.5"])
def test_keras_layers_as_experts(kind, dispatcher):
    arguments = {**weighed(dispatcher, num_experts=3)[0], "hidden_dim": None}
    experts = keras.layers.Dense(4, "tanh")
    if kind == "list":
        experts = [keras.layers.Dense(4, "tanh", name=f"expert_{e}") for e in range(3)]
    layer = layers.MoE(experts=experts, **arguments, router=routers.TopKRouter(3, losses=NO_LOSSES))
    layer.build((None, None, 4))
    helpers.randomize_weights(layer, 60)
    x, cotangent = inputs_of((2, 5, 4), 61), inputs_of((2, 5, 4), 62)
    (outputs, routing), _, gradients = helpers.values_and_gradients(
        layer, x, cotangent, lambda result: result[0], return_routing=True
    )
    weights = {name: each.astype("float64") for name, each in helpers.weights_of(layer).items()}

    def values(at):
        flat, total = at["inputs"].reshape(-1, 4), np.zeros((10, 4))
        for n, row in enumerate(flat):
            p = losses.softmax(row @ at["router/kernel"])
            chosen = routing.experts.reshape(-1, 2)[n]
            for j, e in enumerate(chosen):
                if routing.kept.reshape(-1, 2)[n, j]:
                    path = f"experts/expert_{e}"
                    read = p[e] / p[chosen].sum() * row
                    total[n] += np.tanh(read @ at[f"{path}/kernel"] + at[f"{path}/bias"])
        return total

    at = {"inputs": x.astype("float64"), **weights}
    helpers.assert_close(outputs.reshape(10, 4), values(at), "outputs")
    flat = cotangent.reshape(10, 4)
    helpers.assert_all_close(gradients, slopes_of(lambda at: np.sum(values(at) * flat), at))


@pytest.mark.parametrize("group", ["batch", "example"])
def test_expert_choice(group):
    layer = layers.MoE(4, 5, router="expert_choice", top_k=2, capacity_group=group, **INPUTS)
    layer.build((None, None, 3))
    helpers.randomize_weights(layer)
    rng = np.random.default_rng(1)
    x, cotangent = (rng.normal(size=(2, 6, 3)).astype("float32") for _ in range(2))
    mask = np.arange(6) < np.array([[6], [2]])
    (outputs, routing), _, gradients = helpers.values_and_gradients(
        layer, x, cotangent, lambda result: result[0], mask=mask, return_routing=True
    )
    kept = routing.kept.reshape(-1, 4)
    assert kept.any()
    assert not kept.all()

    def values(at):
        bank = expert_mlp.bank_of(at, "experts")
        flat = at["inputs"].reshape(-1, 3)
        total = np.zeros(flat.shape)
        for n, e in zip(*np.nonzero(kept), strict=True):
            p = losses.softmax(flat[n] @ at["router/kernel"])
            total[n] += expert_mlp.forward(bank, e, p[e] * flat[n], "gelu")[0]
        return total

    weights = {name: each.astype("float64") for name, each in helpers.weights_of(layer).items()}
    at = {"inputs": x.astype("float64"), **weights}
    helpers.assert_close(outputs.reshape(-1, 3), values(at), "outputs")
    flat = cotangent.reshape(-1, 3)
    helpers.assert_all_close(gradients, slopes_of(lambda at: np.sum(values(at) * flat), at))


def test_experts_of_weight_0_are_left_out():
    """A bias would make expert(0 x) something: what ReLU switches off is not asked."""
    layer = layers.MoE(4, 5, router="relu", **INPUTS)
    layer.build((None, 3))
    helpers.randomize_weights(layer)
    x = np.random.default_rng(2).normal(size=(9, 3)).astype("float32")
    (outputs, routing), _ = helpers.call(layer, x, return_routing=True)
    bank = expert_mlp.bank_of(helpers.weights_of(layer), "experts")
    expected = np.zeros(x.shape)
    for n, j in zip(*np.nonzero(routing.weights > 0), strict=True):
        read = routing.weights[n, j].astype("float64") * x[n]
        expected[n] += expert_mlp.forward(bank, routing.experts[n, j], read, "gelu")[0]
    assert (routing.weights == 0).any()
    helpers.assert_close(outputs, expected, "outputs")


@pytest.mark.parametrize("dispatcher", ["walk", "dense", "capacity_1.0", "einsum_0.5"])
def test_half_precision(dispatcher):
    arguments, _ = weighed(dispatcher)
    reference = layers.MoE(**arguments)
    layer = layers.MoE(**arguments, dtype="mixed_bfloat16")
    x = inputs_of((3, 5, 4), 1)
    for each in (reference, layer):
        each.build(x.shape)
        helpers.randomize_weights(each)
    expected = contract.arrays(contract.run(reference, x))[0]
    (output,) = keras.tree.flatten(contract.run(layer, x))
    assert keras.backend.standardize_dtype(output.dtype) == "bfloat16"
    found = keras.ops.convert_to_numpy(keras.ops.cast(output, "float32"))
    contract.assert_near("bfloat16", found, expected, 0.05)


@pytest.mark.one_backend("a choice in Python")
@pytest.mark.parametrize("arguments", [{}, {"capacity_factor": 1.0}, {"router": "expert_choice"}])
def test_the_plan_is_what_is_run(arguments):
    layer = layers.MoE(4, 8, **arguments, **INPUTS)
    assert layer.dispatch_plan(2000).overhead < 2.0
    again = layers.MoE.from_config(layer.get_config())
    assert again.weigh == "inputs"
    assert again.dispatch_plan(64) == layer.dispatch_plan(64)


@pytest.mark.one_backend("a choice in Python")
def test_a_dispatcher_of_ones_own():
    class Mine(dispatch.DenseDispatcher):
        name = "mine"

    x = inputs_of((9, 4), 3)
    outputs = []
    for asked in (Mine(), "walk"):
        layer = layers.MoE(5, 6, dispatch=asked, **INPUTS)
        layer.build(x.shape)
        helpers.randomize_weights(layer)
        outputs.append(helpers.call(layer, x)[0])
    helpers.assert_close(outputs[0], outputs[1], "outputs")


@pytest.mark.one_backend("a check of Python")
def test_what_it_can_be():
    with pytest.raises(ValueError, match=r"`weigh` must be one of \['inputs', 'outputs'\]"):
        layers.MoE(4, 8, weigh="both")
