"""Hash layers: a token's id alone decides where it goes."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import layers, routers
from tests import helpers

D, E, V = 4, 5, 40


def make(top_k=1, **arguments):
    layer = layers.MoE(E, 8, router=routers.TokenHashRouter(E, V, top_k, seed=3), **arguments)
    layer.build((None, None, D))
    return layer


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(*shape, D)).astype("float32")


def draw_ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, size=shape).astype("int32")


def table_of(router):
    return ops.convert_to_numpy(router.table)


def functional(router):
    """A model whose expert layer reads what its embedding reads."""
    ids = keras.Input((None,), dtype="int32")
    embedded = keras.layers.Embedding(V, D, mask_zero=True)(ids)
    return keras.Model(ids, layers.MoE(E, 8, router=router)(embedded, token_ids=ids))


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_the_id_decides_and_nothing_else(top_k):
    layer, ids = make(top_k), draw_ids(3, 7)
    for seed in (0, 1):
        (_, routing), _ = helpers.call(
            layer, tokens(3, 7, seed=seed), token_ids=ids, return_routing=True
        )
        np.testing.assert_array_equal(routing.experts, table_of(layer.router)[ids])
        np.testing.assert_allclose(routing.weights, 1.0 / top_k)


@pytest.mark.parametrize("top_k", [1, 2, 3, E])
def test_a_row_of_the_table_has_distinct_experts_drawn_evenly(top_k):
    router = routers.TokenHashRouter(E, 4000, top_k, seed=1)
    router.build((None, D))
    table = table_of(router)
    assert all(len(set(row)) == top_k for row in table)
    for choice in range(top_k):
        shares = np.bincount(table[:, choice], minlength=E) / len(table)
        np.testing.assert_allclose(shares, 1.0 / E, atol=0.03)


def test_the_table_comes_from_the_seed():
    tables = []
    for seed in (7, 7, 8):
        router = routers.TokenHashRouter(E, V, 2, seed=seed)
        router.build((None, D))
        tables.append(table_of(router))
    np.testing.assert_array_equal(tables[0], tables[1])
    assert (tables[0] != tables[2]).any()
    # Written down, since every backend must draw it.
    np.testing.assert_array_equal(tables[0][:4], FIRST_ROWS_OF_SEED_7)


FIRST_ROWS_OF_SEED_7 = [[3, 0], [1, 4], [3, 2], [1, 2]]


def test_ids_beyond_the_vocabulary_wrap_around():
    layer, ids = make(), draw_ids(2, 3)
    (_, routing), _ = helpers.call(layer, tokens(2, 3), token_ids=ids, return_routing=True)
    for shift in (V, -V):
        (_, other), _ = helpers.call(
            layer, tokens(2, 3), token_ids=ids + shift, return_routing=True
        )
        np.testing.assert_array_equal(other.experts, routing.experts)


def test_padding_may_have_any_id_and_is_not_counted():
    layer, ids = make(), draw_ids(2, 4)
    mask = np.arange(4) < np.array([[4], [1]])
    ids[~mask] = -9
    outputs, _ = helpers.call(layer, tokens(2, 4), token_ids=ids, mask=mask, training=True)
    np.testing.assert_array_equal(outputs[~mask], 0.0)
    counts = layer.running_counts()
    assert counts["decisions"] == counts["load"].sum() == 5
    np.testing.assert_array_equal(
        counts["load"], np.bincount(table_of(layer.router)[ids[mask], 0], minlength=E)
    )


@pytest.mark.parametrize("router", ["top_k", "token_hash"])
def test_the_mask_of_the_inputs_counts_beside_ids(router):
    """Keras hands it on to a call of one tensor only."""
    model = functional(routers.TokenHashRouter(E, V) if router == "token_hash" else router)
    mixture = model.layers[-1]
    ids = draw_ids(2, 6)
    ids[0, :4] = 0
    outputs, _ = helpers.call(model, ids, training=True)
    assert mixture.running_counts()["decisions"] == (ids != 0).sum()
    assert not outputs[ids == 0].any()
    assert outputs[ids != 0].any(axis=-1).all()


def test_it_learns_nothing_and_the_experts_do():
    layer, ids = make(), draw_ids(2, 6)
    assert not layer.router.trainable_variables
    _, losses, gradients = helpers.values_and_gradients(
        layer, tokens(2, 6), tokens(2, 6, seed=1), token_ids=ids
    )
    assert losses == []
    assert np.abs(gradients["experts/kernel_0"]).max() > 1e-3


@pytest.mark.parametrize("top_k", [1, 2])
def test_a_balanced_table_evens_out_a_skewed_vocabulary(top_k):
    """Zipf's law: the most frequent ids go to the emptiest experts (Roller et al., section 3)."""
    router = routers.TokenHashRouter(E, V, top_k, seed=3)
    router.build((None, D))
    frequencies = 1000.0 / np.arange(1, V + 1)
    frequencies[-10:] = 0.0

    def loads():
        return np.bincount(
            table_of(router).ravel(), weights=np.repeat(frequencies, top_k), minlength=E
        )

    before = loads()
    router.balance(frequencies)
    after = loads()
    assert after.sum() == pytest.approx(before.sum())
    # No rule can give an expert less than the most frequent id.
    limit = max(frequencies[0], after.mean())
    assert after.max() <= 1.05 * limit < before.max()
    assert all(len(set(row)) == top_k for row in table_of(router))
    never = np.bincount(table_of(router)[-10:].ravel(), minlength=E)
    assert never.max() == never.min() == 2 * top_k, "ids that do not occur are spread too"


def test_a_functional_model_trains_saves_and_loads(tmp_path):
    model = functional(routers.TokenHashRouter(E, V, 2))
    ids = draw_ids(8, 6)
    router = model.layers[-1].router
    router.balance(np.arange(V, dtype="float64"))
    table = table_of(router)
    model.compile("adam", "mse", jit_compile=keras.backend.backend() != "torch")
    history = model.fit(ids, np.ones((8, 6, D), "float32"), epochs=3, verbose=0).history["loss"]
    assert history[-1] < history[0]
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(table_of(again.layers[-1].router), table)
    np.testing.assert_array_equal(again.predict(ids, verbose=0), model.predict(ids, verbose=0))
    again.fit(ids, np.ones((8, 6, D), "float32"), verbose=0)


def test_the_table_stays_whole_under_mixed_precision():
    """bfloat16 has not every integer above 256."""
    layer = layers.MoE(300, 2, router=routers.TokenHashRouter(300, 900, seed=0), dtype="bfloat16")
    layer.build((None, D))
    ids = np.arange(900, dtype="int32")
    (_, routing), _ = helpers.call(layer, tokens(900), token_ids=ids, return_routing=True)
    np.testing.assert_array_equal(routing.experts, table_of(layer.router))
    assert table_of(layer.router).max() > 256


def test_other_routers_ignore_token_ids():
    layer = layers.MoE(E, 8)
    layer.build((None, None, D))
    x = tokens(2, 3)
    plain, _ = helpers.call(layer, x)
    np.testing.assert_array_equal(helpers.call(layer, x, token_ids=draw_ids(2, 3))[0], plain)


WRONG = [
    (lambda: make()(tokens(2, 3)), r"`MoE` needs `token_ids` for its router: .*token_ids=None"),
    (lambda: make()(keras.Input((3, D))), "`MoE` needs `token_ids`"),
    (
        lambda: make()(tokens(2, 3), token_ids=draw_ids(2, 4)),
        r"`token_ids` with one entry per token, shape \(2, 3\) .*token_ids_shape=\(2, 4\)",
    ),
    (
        lambda: make()(keras.Input((3, D)), token_ids=keras.Input((4,), dtype="int32")),
        "`token_ids` with one entry per token",
    ),
    (
        lambda: make()(tokens(2, 3), token_ids=np.zeros((2, 3), "float32")),
        "`token_ids` must be integers. Received: dtype='float32'",
    ),
    (lambda: make(routing_level="example"), "'token' where the router reads token ids"),
    (lambda: routers.TokenHashRouter(E, 0), "`vocabulary_size` must be a positive integer"),
    (lambda: routers.TokenHashRouter(E, V, 9), "`top_k` must be .* num_experts=5. Received"),
    (
        lambda: make().router.balance(np.ones(V - 1)),
        r"`frequencies` must be numbers of at least 0.*\(40,\). Received: shape=\(39,\)",
    ),
    (lambda: make().router.balance(-np.ones(V)), "`frequencies` must be numbers of at least 0"),
]


@pytest.mark.parametrize(("make_it", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_arguments(make_it, message):
    with pytest.raises(ValueError, match=message) as error:
        make_it()
    assert "Received: " in str(error.value)


def test_the_router_alone_asks_for_ids():
    router = routers.TokenHashRouter(E, V)
    router.build((None, D))
    with pytest.raises(ValueError, match="`TokenHashRouter` needs `token_ids`"):
        router(tokens(3))
