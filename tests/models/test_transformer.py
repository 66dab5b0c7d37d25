"""The decoder: values from the equations, causality, any length, what is refused."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import layers, record_routing, routers
from keras_moe.flops import active_flops
from keras_moe.models import decoder
from tests.helpers import randomize_weights
from tests.oracle import moe, transformer

pytestmark = pytest.mark.one_backend("made of layers that are tested everywhere")

BACKEND = keras.backend.backend()
SMALL = {"width": 12, "depth": 2, "num_heads": 3, "mlp_dim": 20, "max_length": 16}
VOCABULARY = 11
MIXTURES = {
    "dense": {},
    "moe": {"feed_forward": "moe", "feed_forward_arguments": {"num_experts": 4}},
    "switch": {"feed_forward": "switch", "feed_forward_arguments": {"num_experts": 4}},
    "bias": {
        "feed_forward": "moe",
        "feed_forward_arguments": {"num_experts": 4, "router": "sigmoid_bias"},
    },
    "causal soft": {
        "feed_forward": lambda block: layers.SoftMoE(3, 20, causal=True, name=f"soft_{block}")
    },
}


def small(vocabulary_size=VOCABULARY, **arguments):
    return decoder(vocabulary_size, **{**SMALL, **arguments})


def tokens_of(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, VOCABULARY, size=shape)


def random_decoder(**arguments):
    model = small(**arguments)
    randomize_weights(model, seed=3, size=0.5)
    return model


def logits_of(model, tokens):
    return ops.convert_to_numpy(model(tokens))


# === Values ===


def forward(tokens, weights, *, qk_norm, mixtures):
    """The small decoder once more, in float64."""
    x = weights["token_embedding/embeddings"][tokens]
    x = x + weights["position_embedding/positions"][: tokens.shape[1]]
    x = transformer.blocks(
        x, weights, SMALL["depth"], mixtures=mixtures, qk_norm=qk_norm, is_causal=True
    )
    x = transformer.layer_norm(x, weights, "decoder_norm")
    return x @ weights["head/kernel"] + weights["head/bias"]


@pytest.mark.every_backend
@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("moe_block", [None, 1])
def test_values_are_the_equations(qk_norm, moe_block):
    arguments = {} if moe_block is None else {**MIXTURES["moe"], "moe_layers": [moe_block]}
    model = random_decoder(qk_norm=qk_norm, **arguments)
    weights = {
        weight.path: ops.convert_to_numpy(weight).astype("float64")
        for weight in model.trainable_weights
    }

    def mix(y, own):
        return moe.run(y, own).outputs

    tokens = tokens_of(3, 10)
    mixtures = {moe_block: (f"block_{moe_block}_moe", mix)}
    expected = forward(tokens, weights, qk_norm=qk_norm, mixtures=mixtures)
    np.testing.assert_allclose(logits_of(model, tokens), expected, rtol=2e-4, atol=2e-4)
    assert np.ptp(expected, axis=0).max() > 0.5, "tokens that all give the same prove nothing"


def test_first_predictions_are_uniform():
    assert not logits_of(small(), tokens_of(2, 5)).any()


# === Causality ===


@pytest.mark.parametrize("kind", MIXTURES)
def test_logits_depend_on_no_later_token(kind):
    model = random_decoder(**MIXTURES[kind])
    tokens = tokens_of(1, 12)
    before = logits_of(model, tokens)
    assert np.isfinite(before).all()
    for place in (1, 6, 11):
        changed = tokens.copy()
        changed[:, place:] = (changed[:, place:] + 1 + np.arange(12 - place) % 3) % VOCABULARY
        after = logits_of(model, changed)
        np.testing.assert_allclose(after[:, :place], before[:, :place], rtol=1e-5, atol=1e-5)
        assert (np.abs(after[:, place:] - before[:, place:]).max(-1) > 1e-3).all()


@pytest.mark.parametrize("kind", ["dense", "moe", "bias"])
def test_padding_on_the_right_and_other_texts_change_nothing(kind):
    model = random_decoder(**MIXTURES[kind])
    tokens = tokens_of(4, 12)
    together = logits_of(model, tokens)
    for row in range(4):
        alone = logits_of(model, tokens[row : row + 1, :5])
        np.testing.assert_allclose(alone[0], together[row, :5], rtol=1e-5, atol=1e-5)


LOOKING_AHEAD = [
    ({"router": "expert_choice"}, "where experts choose their tokens"),
    ({"routing_level": "example"}, "routes by the mean of all tokens"),
    ({"top_k": 2, "capacity_factor": 0.5}, "first choices of later tokens go before second"),
    ({"router": "sinkhorn"}, "balances over all tokens in training"),
    ({"router": "batch_priority", "capacity_factor": 1.0}, "gives slots to later tokens first"),
    ({"router": "no_token_left"}, "sends a token where later ones leave room"),
]


@pytest.mark.parametrize(("arguments", "reason"), LOOKING_AHEAD)
def test_what_looks_ahead_is_refused(arguments, reason):
    arguments = {"num_experts": 4, **arguments}
    with pytest.raises(ValueError, match=f"`feed_forward` must be causal: .*{reason}"):
        small(feed_forward="moe", feed_forward_arguments=arguments)


@pytest.mark.parametrize("arguments", [arguments for arguments, _ in LOOKING_AHEAD[:3]])
def test_what_is_refused_does_look_ahead(arguments):
    # Small tokens: slots are in short supply, so that a later one displaces an earlier one.
    layer = layers.MoE(4, 8, **arguments)
    x = np.random.default_rng(0).normal(size=(1, 12, 6)).astype("float32")
    before = ops.convert_to_numpy(layer(x))
    x[:, 6:] += 3.0
    after = ops.convert_to_numpy(layer(x))
    assert np.abs(after - before)[:, :6].max() > 1e-4


def test_soft_slots_are_refused():
    with pytest.raises(ValueError, match=r"`SoftMoE` mix all tokens, unless it has `causal=True`"):
        small(feed_forward=lambda block: layers.SoftMoE(4, 8))


@pytest.mark.parametrize(
    "arguments", [{"router": "batch_priority"}, {"top_k": 1, "capacity_factor": 0.5}]
)
def test_what_serves_earlier_tokens_first_is_causal(arguments):
    arguments = {"num_experts": 4, **arguments}
    assert small(feed_forward="moe", feed_forward_arguments=arguments).built


# === Structure ===


@pytest.mark.parametrize(
    ("moe_layers", "blocks"), [(1, [0, 1, 2, 3]), (2, [1, 3]), ("last_half", [2, 3]), ([0], [0])]
)
def test_moe_layers(moe_layers, blocks):
    model = small(depth=4, moe_layers=moe_layers, **MIXTURES["moe"])
    mixtures = [layer.name for layer in model.layers if isinstance(layer, layers.MoE)]
    assert mixtures == [f"block_{block}_moe" for block in blocks]


def test_named_feed_forwards_take_arguments_over_defaults():
    switch = small(
        activation="silu",
        dropout=0.1,
        feed_forward="switch",
        feed_forward_arguments={"num_experts": 4, "hidden_dim": 7},
    ).get_layer("block_0_switch")
    assert (switch.hidden_dim, switch.dropout) == (7, 0.1)
    assert switch.activation is keras.activations.silu


def test_routers_that_read_token_ids_get_them():
    tables = [routers.TokenHashRouter(4, VOCABULARY, seed=seed) for seed in (0, 1)]
    model = small(
        feed_forward=lambda block: layers.MoE(4, 8, router=tables[block], name=f"{block}")
    )
    tokens = tokens_of(2, 7)
    with record_routing(model) as records:
        model(tokens)
    for block, router in enumerate(tables):
        table = ops.convert_to_numpy(router.table)
        np.testing.assert_array_equal(records[f"{block}"][0].experts, table[tokens])


def test_lengths_up_to_the_longest():
    model = small(**MIXTURES["moe"])
    assert model.input_shape == (None, None)
    assert model.output_shape == (None, None, VOCABULARY)
    for length in (1, 16):
        assert logits_of(model, tokens_of(2, length)).shape == (2, length, VOCABULARY)
    with pytest.raises(ValueError, match=r"at most max_length=16 places\. Received: n=17"):
        model(tokens_of(2, 17))


def test_the_head_is_float32_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = small(**MIXTURES["moe"])
    assert keras.backend.standardize_dtype(model.output.dtype) == "float32"
    norm = model.get_layer("decoder_norm")
    assert keras.backend.standardize_dtype(norm.output.dtype) == "bfloat16"
    assert np.isfinite(logits_of(model, tokens_of(2, 5))).all()


def test_active_flops_by_hand():
    width, hidden, n = SMALL["width"], SMALL["mlp_dim"], 10
    attention = 4 * width * width + 2 * n * width  # projections, scores and mixing
    router, experts = width * 4, 2 * 2 * width * hidden
    per_token = 2 * (attention + router + experts) + width * VOCABULARY
    assert active_flops(small(**MIXTURES["moe"]), input_shape=(n,)) == 2 * n * per_token


# === Training and saving ===


@pytest.mark.parametrize(
    "kind", ["dense", pytest.param("moe", marks=pytest.mark.every_backend), "switch"]
)
def test_learns_to_count_and_comes_back(kind, tmp_path):
    model = small(qk_norm=True, dropout=0.02, **MIXTURES[kind])
    model.compile(
        keras.optimizers.Adam(1e-2),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        jit_compile=BACKEND == "jax",  # on TensorFlow the ViT goes through XLA, this a graph
    )
    text = (np.arange(9) + np.arange(64)[:, None]) % VOCABULARY
    history = model.fit(text[:, :-1], text[:, 1:], batch_size=16, epochs=12, verbose=0).history
    assert history["loss"][-1] < 0.3 * history["loss"][0]
    model.save(tmp_path / "decoder.keras")
    loaded = keras.saving.load_model(tmp_path / "decoder.keras")
    np.testing.assert_array_equal(loaded.predict(text, verbose=0), model.predict(text, verbose=0))


def test_gradients_reach_every_weight():
    model = random_decoder(qk_norm=True, **MIXTURES["moe"])
    before = {weight.path: ops.convert_to_numpy(weight) for weight in model.trainable_weights}
    model.compile(
        keras.optimizers.SGD(1.0), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    tokens = tokens_of(16, 17)
    model.fit(tokens[:, :-1], tokens[:, 1:], batch_size=16, verbose=0)
    for weight in model.trainable_weights:
        if weight.path.endswith("attention/key/bias"):
            continue  # moves nothing but the norm's mean
        change = np.abs(ops.convert_to_numpy(weight) - before[weight.path]).max()
        assert change > 1e-7, weight.path


# === Bad input ===

BAD = [
    ({"vocabulary_size": 0}, "`vocabulary_size` must be a positive integer. Received: .*=0"),
    ({"width": 0}, "`width` must be a positive integer. Received: width=0"),
    ({"depth": None}, "`depth` must be a positive integer. Received: depth=None"),
    ({"width": 13}, "`width` must be a multiple of `num_heads`. Received: width=13, num_heads=3"),
    ({"mlp_dim": -1}, "`mlp_dim` must be a positive integer. Received: mlp_dim=-1"),
    ({"max_length": 0}, "`max_length` must be a positive integer. Received: max_length=0"),
    ({"dropout": 1.0}, r"`dropout` must be a number in \[0, 1\). Received: dropout=1.0"),
    ({"moe_layers": 3}, "`moe_layers` must be an integer between 1 and depth=2. Received: .*=3"),
    (
        {"feed_forward": "soft_moe"},
        r"`feed_forward` must be one of \['dense', 'moe', 'switch'\].*'soft_moe'",
    ),
    ({"feed_forward": "moe"}, "`feed_forward_arguments` must give the `num_experts` of 'moe'"),
    (
        {"feed_forward_arguments": {"num_experts": 4}},
        "`feed_forward_arguments` belong to a `feed_forward` of the names .*'dense'",
    ),
    (
        {"feed_forward": lambda block: keras.layers.Dense(5)},
        r"must return a layer that keeps the shape \(None, None, 12\)",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)
