"""No-Token-Left-Behind: overflow finds the next expert, and what finds none is dropped."""

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe import layers, routers
from tests import helpers
from tests.oracle.moe import capacity_of

D, E, N = 4, 5, 24


def built(top_k, factor, **arguments):
    router = routers.NoTokenLeftRouter(E, top_k, capacity_factor=factor, **arguments)
    router.build((None, D))
    helpers.randomize_weights(router)
    return router


def draw(seed, skew, count=N):
    """Tokens that, with a skew, all want the same experts."""
    return (np.random.default_rng(seed).normal(size=(count, D)) + skew).astype("float32")


def loads_of(routing):
    return np.bincount(routing.experts[routing.kept], minlength=E)


few = settings(deadline=None, max_examples=10, derandomize=True)
inputs = {"seed": st.integers(0, 2**16), "skew": st.sampled_from([0.0, 2.0, -10.0])}


@pytest.mark.parametrize(("top_k", "factor"), [(1, 1.0), (1, 0.4), (2, 1.0), (3, 0.7)])
def test_no_expert_has_more_than_its_places(top_k, factor):
    call = helpers.Callable(built(top_k, factor))
    capacity = capacity_of(factor, top_k, N, E)

    @few
    @given(bits=st.integers(0, 2**N - 1), **inputs)
    def check(seed, skew, bits):
        mask = np.array([bits >> n & 1 for n in range(N)], bool)
        routing, _ = call(draw(seed, skew), mask=mask)
        loads = loads_of(routing)
        assert (loads <= capacity).all()
        assert not routing.kept[~mask].any(), "padding takes no place"
        assert all(len(set(row)) == top_k for row in routing.experts)
        np.testing.assert_array_equal(routing.weights[~routing.kept], 0.0)
        assert (routing.weights[routing.kept] > 0).all()
        # Whoever is short of experts has asked all, and those that it did not get are full.
        for n in np.nonzero(mask & ~routing.kept.all(axis=1))[0]:
            refused = np.setdiff1d(np.arange(E), routing.experts[n][routing.kept[n]])
            assert (loads[refused] == capacity).all()

    check()


@pytest.mark.parametrize(("top_k", "factor"), [(1, 1.0), (2, E / 4)])
def test_nobody_is_dropped_with_places_enough(top_k, factor):
    """From E / (E - k + 1) on, which with k = 1 is 1; a plain top-k drops under this skew."""
    call = helpers.Callable(built(top_k, factor))

    @few
    @given(**inputs)
    def check(seed, skew):
        routing, _ = call(draw(seed, skew))
        assert routing.kept.all()

    check()
    plain = layers.MoE(E, 8, top_k=top_k, capacity_factor=factor)
    plain.build((None, D))
    helpers.randomize_weights(plain)
    (_, routing), _ = helpers.call(plain, draw(0, 2.0), return_routing=True)
    assert not routing.kept.all()


@pytest.mark.parametrize("top_k", [2, 3])
def test_no_token_is_left_without_an_expert(top_k):
    call = helpers.Callable(built(top_k, 1.0))

    @few
    @given(**inputs)
    def check(seed, skew):
        routing, _ = call(draw(seed, skew))
        assert routing.kept.any(axis=1).all()

    check()


def test_too_few_rounds_drop():
    """One round is the Switch layer; each round more drops fewer."""
    x = draw(0, 2.0)
    dropped = [
        int((~helpers.call(built(1, 1.0, rounds=rounds), x)[0].kept).sum())
        for rounds in range(1, E + 1)
    ]
    assert dropped == sorted(dropped, reverse=True)
    assert dropped[0] > dropped[1] > dropped[-1] == 0
    layer = layers.MoE(E, 8, router="switch", capacity_factor=1.0)
    layer.build((None, D))
    helpers.randomize_weights(layer)
    (_, routing), _ = helpers.call(layer, x, return_routing=True)
    assert dropped[0] == int((~routing.kept).sum())


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_equals_top_k_with_ample_capacity(top_k):
    x, mask = draw(1, 1.0), np.arange(N) % 3 != 0
    plain = routers.TopKRouter(E, top_k)
    plain.build((None, D))
    helpers.randomize_weights(plain)
    expected, _ = helpers.call(plain, x, mask=mask)
    routing, _ = helpers.call(built(top_k, float(E)), x, mask=mask)
    for name in ("experts", "kept", "logits", "load"):
        np.testing.assert_array_equal(getattr(routing, name), getattr(expected, name))
    np.testing.assert_array_equal(routing.weights[mask], expected.weights[mask])
    helpers.assert_all_close(routing.losses, expected.losses)


def test_ties_go_to_the_lower_expert_and_the_earlier_token():
    router = built(1, 1.0)
    router.kernel.assign(np.zeros((D, E), "float32"))
    routing, _ = helpers.call(router, np.ones((10, D), "float32"))
    np.testing.assert_array_equal(routing.experts[:, 0], np.repeat(np.arange(E), 2))


def test_losses_and_load_are_those_before_overflow():
    """Counted after it, a router that sends all to one expert would look balanced."""
    x = np.ones((20, D), "float32")
    router = built(1, 1.0)
    kernel = np.zeros((D, E), "float32")
    kernel[:, 2] = 2.0
    router.kernel.assign(kernel)
    routing, _ = helpers.call(router, x)
    np.testing.assert_array_equal(routing.load, [0, 0, 20, 0, 0])
    np.testing.assert_array_equal(loads_of(routing), [4] * E)
    assert routing.losses["balance"] > 4.9


def test_drops_are_counted():
    layer = layers.MoE(E, 8, router="no_token_left", top_k=1, capacity_factor=0.5)
    layer.build((None, None, D))
    x, mask = draw(0, 2.0).reshape(2, 12, D), np.arange(12) < np.array([[12], [10]])
    (outputs, routing), _ = helpers.call(layer, x, mask=mask, training=True, return_routing=True)
    counts = layer.running_counts()
    capacity = capacity_of(0.5, 1, N, E)
    assert counts["assignments"] == counts["decisions"] == counts["load"].sum() == 22
    assert counts["dropped"] == 22 - routing.kept.sum() == 22 - E * capacity
    np.testing.assert_array_equal(outputs[~routing.kept[..., 0]], 0.0)


def test_a_named_router_has_the_capacity_of_its_layer():
    own = layers.MoE(E, 8, router="no_token_left").router
    assert (own.capacity_factor, own.eval_capacity_factor) == (1.25, None)
    layer = layers.MoE(
        E, 8, router="no_token_left", top_k=1, capacity_factor=0.5, eval_capacity_factor=1.0
    )
    layer.build((None, D))
    x = draw(0, 2.0, 20)
    for training, kept in [(True, 10), (False, 20)]:
        (_, routing), _ = helpers.call(layer, x, training=training, return_routing=True)
        assert routing.kept.sum() == kept
    again = layers.MoE.from_config(layer.get_config()).router
    assert (again.capacity_factor, again.eval_capacity_factor) == (0.5, 1.0)


@pytest.mark.parametrize("arguments", [{}, {"capacity_factor": 0.6}, {"dispatch": "dense"}])
def test_dispatchers_drop_nothing_more(arguments):
    layer = layers.MoE(E, 8, router="no_token_left", top_k=2, **arguments)
    layer.build((None, D))
    helpers.randomize_weights(layer)
    x = draw(3, 2.0)
    (_, routing), _ = helpers.call(layer, x, return_routing=True)
    alone, _ = helpers.call(layer.router, x)
    np.testing.assert_array_equal(routing.kept, alone.kept)


def test_a_token_that_is_not_finite_changes_no_other_row_of_weights():
    router = built(1, 9.0)
    x = draw(0, 0.0)
    expected, _ = helpers.call(router, x)
    x[3, 1] = np.nan
    routing, _ = helpers.call(router, x)
    others = np.arange(N) != 3
    np.testing.assert_array_equal(routing.weights[others], expected.weights[others])
    assert np.isnan(routing.weights[3]).all()


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX shows its program")
def test_rounds_do_not_unroll():
    """Placing many experts' tokens is the program of placing few: a loop."""
    import jax

    def size(num_experts):
        wanted = ops.zeros((8, num_experts), dtype="int32")
        router = routers.NoTokenLeftRouter(num_experts, 1)
        traced = jax.make_jaxpr(lambda r: router._granted(r, r[:, 0] == 0, 2))(wanted)
        return len(str(traced.jaxpr).splitlines())

    assert size(4) == size(64)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: routers.NoTokenLeftRouter(4, capacity_factor=0), "`capacity_factor` must be a nu"),
        (
            lambda: routers.NoTokenLeftRouter(4, 2, rounds=1),
            "`rounds` must be an integer between 2",
        ),
        (
            lambda: routers.NoTokenLeftRouter(4, rounds=5),
            "`rounds` .* num_experts=4. Received: rou",
        ),
        (
            lambda: layers.MoE(4, 8, router="no_token_left", capacity_group="example"),
            "`capacity_group` must be 'batch' where the router has a capacity of its own",
        ),
        (
            lambda: layers.MoE(4, 8, router="no_token_left", routing_level="example"),
            "`routing_level` must be 'token' where the router has a capacity of its own",
        ),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message) as error:
        make()
    assert "Received: " in str(error.value)
