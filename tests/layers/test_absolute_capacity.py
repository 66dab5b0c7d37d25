"""`capacity`, a number of slots per expert: what the factor that gives as many slots does."""

import keras
import numpy as np
import pytest

from keras_moe import callbacks, layers, models, routers
from tests import helpers

N, D, E, K = 24, 4, 4, 2
WAYS = {
    "auto": {},
    "slots": {"dispatch": "slots"},
    "walk": {"dispatch": "walk"},
    "einsum": {"dispatch": "einsum"},
    "dense": {"dispatch": "dense"},
    "per example": {"capacity_group": "example"},
    "surest first": {"router": "batch_priority"},
    "no token left": {"router": "no_token_left"},
    "expert choice": {"router": "expert_choice"},
    "expert choice per example": {"router": "expert_choice", "capacity_group": "example"},
    "weighed inputs": {"weigh": "inputs"},
    "example level": {"routing_level": "example"},
}


def results(arguments, mask=True):
    layer = layers.MoE(E, 5, top_k=K, **arguments)
    layer.build((None, None, D))
    helpers.randomize_weights(layer)
    rng = np.random.default_rng(0)
    x, cotangent = (rng.normal(size=(3, N // 3, D)).astype("float32") for _ in range(2))
    call = {"mask": np.arange(N // 3) < np.array([[8], [5], [2]])} if mask else {}
    (outputs, routing), losses, gradients = helpers.values_and_gradients(
        layer, x, cotangent, lambda result: result[0], return_routing=True, **call
    )
    return layer, routing, {"outputs": outputs, "losses": np.sum(losses), **gradients}


@pytest.mark.parametrize(
    "slots", [3, pytest.param(1, marks=pytest.mark.one_backend("one number is enough elsewhere"))]
)
@pytest.mark.parametrize("way", WAYS)
def test_it_is_the_factor_of_as_many_slots(way, slots):
    arguments = WAYS[way]
    group = N // 3 if arguments.get("capacity_group") == "example" else N
    by_number, routing, found = results({"capacity": slots, **arguments})
    by_factor = {"capacity_factor": slots * E / (K * group), **arguments}
    _, expected_routing, expected = results(by_factor)
    np.testing.assert_array_equal(routing.kept, expected_routing.kept)
    np.testing.assert_array_equal(routing.asked, expected_routing.asked)
    helpers.assert_all_close(found, expected)
    assert not routing.kept.all()
    assert by_number.has_capacity


@pytest.mark.one_backend("the smaller one of two integers")
@pytest.mark.parametrize("way", WAYS)
def test_more_slots_than_tokens_are_as_many(way):
    _, routing, found = results({"capacity": 1000, **WAYS[way]}, mask=False)
    _, expected_routing, expected = results({"capacity": N, **WAYS[way]}, mask=False)
    assert routing.kept.all()
    assert expected_routing.kept.all()
    helpers.assert_all_close(found, expected)


def test_slots_do_not_grow_with_the_batch():
    layer = layers.MoE(E, 5, top_k=1, capacity=2)
    layer.build((None, D))
    for count in (4, 40):
        x = np.ones((count, D), "float32")  # equal tokens: all want one expert
        (_, routing), _ = helpers.call(layer, x, return_routing=True, training=True)
        assert routing.kept.sum() == 2


def test_the_layers_around_it():
    layer = layers.SwitchFFN(E, 5, capacity=3, capacity_factor=None)
    again = layers.SwitchFFN.from_config(layer.get_config())
    assert (again.capacity, again.capacity_factor) == (3, None)
    router = routers.NoTokenLeftRouter(E, 1, capacity=2, capacity_factor=None)
    again = routers.NoTokenLeftRouter.from_config(router.get_config())
    again.build((None, D))
    routing, _ = helpers.call(again, np.ones((N, D), "float32"))
    np.testing.assert_array_equal(np.bincount(routing.experts[routing.kept]), [2] * E)
    with pytest.raises(ValueError, match="gives slots to later tokens first"):
        models.decoder(
            9, width=8, depth=1, num_heads=1, feed_forward="moe",
            feed_forward_arguments={"num_experts": 2, "capacity": 3, "router": "batch_priority"},
        )  # fmt: skip


@pytest.mark.one_backend("messages")
def test_what_watches_knows_of_it():
    inputs = keras.Input((D,))
    layer = layers.MoE(E, 5, top_k=1, capacity=1, name="mixture")
    model = keras.Model(inputs, layer(inputs))
    model.compile("sgd", "mse")
    x = np.ones((256, D), "float32")
    with pytest.warns(UserWarning, match="Try a larger `capacity` than 1, `capacity=None`"):
        history = model.fit(x, x, verbose=0, callbacks=[callbacks.ExpertMonitor()])
    assert history.history["mixture/dropped"][0] > 0.9


@pytest.mark.one_backend("checks of Python")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: layers.MoE(E, 5, capacity=0), "`capacity` must be a positive integer"),
        (lambda: layers.MoE(E, 5, capacity=2.0), "`capacity` must be a positive integer"),
        (
            lambda: layers.MoE(E, 5, capacity=2, capacity_factor=1.0),
            "`capacity` must be None, or `capacity_factor` must",
        ),
        (lambda: layers.SwitchFFN(E, 5, capacity=2), "or `capacity_factor` must.*factor=1.25"),
        (
            lambda: layers.MoE(E, 5, capacity=2, eval_capacity_factor=1.0),
            "`eval_capacity_factor` needs a `capacity_factor`",
        ),
        (
            lambda: layers.MoE(E, 5, router="dense", capacity=2),
            "`capacity` must be None with a router that sends every token to all",
        ),
        (
            lambda: routers.NoTokenLeftRouter(E, capacity=2),
            "`capacity` must be None, or `capacity_factor` must",
        ),
        (
            lambda: routers.NoTokenLeftRouter(E, capacity_factor=None),
            "`capacity_factor` must be a number above 0 where there is no `capacity`",
        ),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "Received: " in str(error.value)
