"""The decoder with padding: what is real comes out as if there were none."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import layers, record_routing, routers
from keras_moe.flops import active_flops
from keras_moe.models import MaskedEmbedding, PositionEmbedding, decoder
from tests import helpers
from tests.oracle import moe, transformer

pytestmark = pytest.mark.one_backend("masks are Keras's on every backend")

BACKEND = keras.backend.backend()
PADDING, VOCABULARY = 7, 11
SMALL = {"width": 12, "depth": 2, "num_heads": 3, "mlp_dim": 20, "max_length": 16}
CROSSENTROPY = {"from_logits": True}
SIDES = ("left", "right", "mixed")


def routed(make_router):
    return lambda block: layers.MoE(4, 20, router=make_router(), name=f"block_{block}_moe")


KINDS = {
    "dense": "dense",
    "moe": routed(lambda: routers.TopKRouter(4, 2)),
    "bias": routed(lambda: routers.SigmoidBiasRouter(4, 2, bias_update_rate=0.1)),
    "token hash": routed(lambda: routers.TokenHashRouter(4, VOCABULARY)),
    "causal soft": lambda block: layers.SoftMoE(3, 20, causal=True, name=f"block_{block}_soft"),
}
LOSSES = {
    "z-loss": routed(lambda: routers.TopKRouter(4, 2, losses={"balance": 0.5, "z_loss": 0.5})),
    "sequences": routed(lambda: routers.TopKRouter(4, 2, losses={"sequence_balance": 0.5})),
    "entropies": routed(
        lambda: routers.TopKRouter(4, 2, losses={"local_entropy": 0.5, "global_entropy": 0.5})
    ),
    "bias": KINDS["bias"],
    "token hash": KINDS["token hash"],
}


def small(padding_id=PADDING, **arguments):
    """A decoder of random weights, the same ones for the same arguments."""
    model = decoder(VOCABULARY, padding_id=padding_id, **{**SMALL, **arguments})
    helpers.randomize_weights(model, seed=3, size=0.5)
    return model


def texts_of(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    ids = [each for each in range(VOCABULARY) if each != PADDING]
    return [rng.choice(ids, size=length) for length in lengths]


def padded(texts, width, side):
    """The texts, ids of padding around them, and which ids are real."""
    tokens = np.full((len(texts), width), PADDING, "int32")
    for row, text in enumerate(texts):
        room = width - len(text)
        start = {"left": room, "right": 0, "mixed": min(2 * row, room)}[side]
        tokens[row, start : start + len(text)] = text
    return tokens, tokens != PADDING


def mixtures_of(model):
    return [layer for layer in model.layers if isinstance(layer, layers.MoE | layers.SoftMoE)]


# === Logits ===


@pytest.mark.parametrize(
    ("kind", "qk_norm"), [*((kind, False) for kind in KINDS), ("dense", True), ("moe", True)]
)
def test_logits_are_those_without_padding(kind, qk_norm):
    model = helpers.Callable(small(feed_forward=KINDS[kind], qk_norm=qk_norm))
    texts = texts_of(6, 1, 6, 0)  # the last row is nothing but padding
    long, _ = model(np.array([texts[0], texts[2]]))
    alone = [long[0], model(texts[1][None])[0][0], long[1]]
    for side in SIDES:
        tokens, is_real = padded(texts, 12, side)
        logits, _ = model(tokens)
        assert np.isfinite(logits).all()
        for row, expected in enumerate(alone):
            helpers.assert_close(logits[row][is_real[row]], expected, f"{side}, row {row}")


@pytest.mark.parametrize("moe_block", [None, 1])
def test_values_with_holes_are_the_equations(moe_block):
    """A masked token between others is read by nobody, and moves no position."""
    feed_forward = "dense" if moe_block is None else KINDS["moe"]
    model = small(feed_forward=feed_forward, moe_layers=[moe_block or 0], padding_id=None)
    weights = {
        weight.path: ops.convert_to_numpy(weight).astype("float64")
        for weight in model.trainable_weights
    }
    tokens = np.stack(texts_of(9, 9))
    mask = np.array([[0, 0, 1, 1, 0, 1, 1, 1, 0], [1, 0, 0, 1, 1, 1, 1, 1, 1]], bool)
    places = np.maximum(np.arange(9) - mask.argmax(axis=1)[:, None], 0)
    x = weights["token_embedding/embeddings"][tokens]
    x = x + weights["position_embedding/positions"][places]

    def mix(y, own):
        return moe.run(y, own, mask=mask).outputs

    mixtures = {moe_block: (f"block_{moe_block}_moe", mix)}
    x = transformer.blocks(x, weights, 2, mixtures=mixtures, is_causal=True, mask=mask)
    x = transformer.layer_norm(x, weights, "decoder_norm")
    expected = x @ weights["head/kernel"] + weights["head/bias"]
    logits, _ = helpers.call(model, tokens, mask=mask)
    np.testing.assert_allclose(logits[mask], expected[mask], rtol=2e-4, atol=2e-4)


def test_a_prompt_padded_on_its_left_is_gone_on_with_alike():
    model = small(feed_forward=KINDS["moe"])

    def written(tokens, count=3):
        for _ in range(count):
            chosen = model.predict_on_batch(tokens)[:, -1]
            chosen[:, PADDING] = -np.inf
            tokens = np.concatenate([tokens, chosen.argmax(-1)[:, None]], axis=1)
        return tokens[:, -count:]

    prompts = texts_of(4, 3)
    together = written(padded(prompts, 4, "left")[0])
    for prompt, expected in zip(prompts, together, strict=True):
        np.testing.assert_array_equal(written(prompt[None])[0], expected)


# === The mask of a call ===


def test_the_mask_of_a_call_is_padding_too():
    models = [small(each, feed_forward=KINDS["moe"]) for each in (PADDING, None)]
    with_id, without = (helpers.Callable(model) for model in models)
    tokens, mask = padded(texts_of(6, 3), 9, "left")
    expected, _ = with_id(tokens)
    outputs, _ = without(tokens, mask=mask)
    helpers.assert_close(outputs, expected, "bool")
    outputs, _ = without(tokens, mask=mask.astype("int32"))
    helpers.assert_close(outputs, expected, "int32")
    more = mask.copy()
    more[0, 5] = False  # and what has the id of padding stays masked
    outputs, _ = with_id(tokens, mask=more | ~mask)
    expected, _ = without(tokens, mask=more)
    helpers.assert_close(outputs, expected, "both")


def test_a_mask_is_of_one_call():
    """Keras leaves it on the tensor that the model was called with."""
    model = small(None)
    tokens, mask = padded(texts_of(6, 3), 9, "left")
    tokens = ops.convert_to_tensor(tokens)
    before = ops.convert_to_numpy(model(tokens))
    model(tokens, mask=ops.convert_to_tensor(mask))
    np.testing.assert_array_equal(ops.convert_to_numpy(model(tokens)), before)


def test_a_decoder_inside_of_a_model():
    inner = small(None, feed_forward=KINDS["moe"])
    tokens, mask = padded(texts_of(6, 3), 9, "left")
    inputs = {
        "tokens": keras.Input((None,), dtype="int32", name="tokens"),
        "mask": keras.Input((None,), dtype="bool", name="mask"),
    }
    outer = keras.Model(inputs, inner(inputs["tokens"], mask=inputs["mask"]))
    expected, _ = helpers.call(inner, tokens, mask=mask)
    outputs = outer.predict_on_batch({"tokens": tokens, "mask": mask})
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


def test_a_mask_of_another_shape_is_refused():
    model, tokens = small(), np.stack(texts_of(5, 5))
    for mask in (np.ones((2, 4), bool), np.ones((2, 5, 1), bool)):
        with pytest.raises(ValueError, match=r"a mask with one entry per id, shape \(2, 5\)\."):
            model(tokens, mask=mask)


# === Losses and counts ===


@pytest.mark.parametrize("kind", LOSSES)
def test_losses_and_counts_are_those_without_padding(kind):
    model = small(feed_forward=LOSSES[kind])
    mixtures, run = mixtures_of(model), helpers.Callable(model, training=True)
    texts = texts_of(5, 5, 5)

    def losses_and_counts(tokens):
        for layer in mixtures:
            layer.reset_running_counts()
            if kind == "bias":
                layer.router.bias.assign(np.zeros(4))
        _, losses = run(tokens)
        return np.array(losses), [layer.running_counts() for layer in mixtures]

    expected, counts = losses_and_counts(np.stack(texts).astype("int32"))
    assert all(each["assignments"] == 2 * 15 for each in counts) or kind == "token hash"
    assert (np.abs(expected) > 1e-3).all()
    for side in SIDES:
        padded_losses, padded_counts = losses_and_counts(padded([*texts, []], 9, side)[0])
        np.testing.assert_allclose(padded_losses, expected, rtol=1e-5)
        for found, own in zip(padded_counts, counts, strict=True):
            for name, value in own.items():
                np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def test_of_128_bytes_with_32_real_ones_32_are_counted():
    arguments = {"width": 12, "depth": 1, "num_heads": 3, "padding_id": 0}
    mixture = {"num_experts": 4, "top_k": 1}
    model = decoder(256, **arguments, feed_forward="moe", feed_forward_arguments=mixture)
    tokens = np.zeros((4, 32), "int32")
    tokens[:, 24:] = np.random.default_rng(0).integers(1, 256, size=(4, 8))
    helpers.call(model, tokens, training=True)
    counts = model.get_layer("block_0_moe").running_counts()
    assert counts["assignments"] == counts["decisions"] == counts["load"].sum() == 32


def test_padding_goes_to_nobody_and_takes_no_slot():
    arguments = {"num_experts": 4, "top_k": 1, "capacity_factor": 1.0}
    model = small(feed_forward="moe", feed_forward_arguments=arguments)
    tokens, is_real = padded(texts_of(4, 1, 0), 12, "left")
    with record_routing(model) as records:
        model(tokens)
    for (record,) in records.values():
        # ceil(36 / 4) slots an expert are more than there are real tokens: N counts padding.
        np.testing.assert_array_equal(record.kept[..., 0], is_real)
        assert record.load.sum() == 5


@keras.saving.register_keras_serializable(package="padding_tests")
class KnowsNoMasks(keras.layers.Layer):
    def call(self, inputs):
        return ops.tanh(inputs)


def test_a_feed_forward_that_knows_no_masks_hides_no_padding():
    def feed_forward(block):
        return KnowsNoMasks(name="tanh") if block == 0 else KINDS["moe"](block)

    model = small(feed_forward=feed_forward)
    tokens, is_real = padded(texts_of(6, 3), 9, "left")
    with pytest.warns(UserWarning, match="'tanh' .* does not support masking"):
        model(tokens, training=True)
    assert model.get_layer("block_1_moe").running_counts()["decisions"] == is_real.sum()


# === Training ===


def losses_of(logits, targets):
    logits = logits.astype("float64")
    largest = logits.max(-1, keepdims=True)
    total = np.log(np.exp(logits - largest).sum(-1)) + largest[..., 0]
    return total - np.take_along_axis(logits, targets[..., None], -1)[..., 0]


def compiled(model, rate, jit=BACKEND == "jax"):
    model.compile(
        keras.optimizers.SGD(rate),
        keras.losses.SparseCategoricalCrossentropy(**CROSSENTROPY),
        metrics=["accuracy"],
        weighted_metrics=[keras.metrics.SparseCategoricalCrossentropy(**CROSSENTROPY, name="nats")],
        jit_compile=jit,
    )
    return model


@pytest.mark.parametrize("side", ["left", "right"])
def test_fit_and_evaluate_leave_padding_out_of_loss_and_metrics(side):
    model = compiled(small(feed_forward=KINDS["dense"]), rate=0.0, jit=BACKEND != "torch")
    tokens, is_real = padded(texts_of(6, 3, 0), 9, side)
    targets = np.roll(tokens, -1, axis=1)
    logits, _ = helpers.call(model, tokens)
    losses = losses_of(logits, targets)
    expected = {
        "loss": losses[is_real].mean(),
        "nats": losses[is_real].mean(),
        "accuracy": (logits.argmax(-1) == targets)[is_real].mean(),
    }
    assert abs(losses.mean() - expected["loss"]) > 0.1
    fitted = model.fit(tokens, targets, batch_size=3, verbose=0).history
    found = model.evaluate(tokens, targets, batch_size=3, verbose=0, return_dict=True)
    for name, value in expected.items():
        assert fitted[name] == pytest.approx([value], rel=1e-5), name
        assert found[name] == pytest.approx(value, rel=1e-5), name


@pytest.mark.parametrize(
    "kind", [pytest.param("moe", marks=pytest.mark.every_backend), "causal soft"]
)
def test_a_step_is_that_without_padding(kind):
    texts = texts_of(6, 6, 6)

    def weights_after(tokens):
        targets = np.where(tokens == PADDING, 0, (tokens + 1) % VOCABULARY)
        model = compiled(small(feed_forward=KINDS[kind], qk_norm=True), rate=0.3)
        model.fit(tokens, targets, batch_size=len(tokens), verbose=0)
        return {weight.path: ops.convert_to_numpy(weight) for weight in model.weights}

    expected = weights_after(np.stack(texts).astype("int32"))
    helpers.assert_all_close(weights_after(padded([*texts, []], 9, "left")[0]), expected, 1e-4)


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16", "mixed_float16"])
def test_rows_of_padding_alone_train_without_nan(policy):
    if policy == "mixed_float16" and BACKEND == "jax":
        pytest.skip("JAX has no gradient of attention in float16 on a CPU")
    keras.config.set_dtype_policy(policy)
    arguments = {"num_experts": 4, "router": "sigmoid_bias"}
    model = small(qk_norm=True, dropout=0.1, feed_forward="moe", feed_forward_arguments=arguments)
    compiled(model, rate=0.1)
    tokens, _ = padded(texts_of(5, 0), 9, "left")
    for batch in (tokens, np.full_like(tokens, PADDING)):
        history = model.fit(batch, tokens, batch_size=2, verbose=0).history
        assert np.isfinite(history["loss"]).all()
    assert history["loss"] == [0.0]
    for weight in model.weights:
        assert np.isfinite(ops.convert_to_numpy(weight)).all(), weight.path
    assert np.isfinite(model.predict(tokens, verbose=0)).all()


def test_steps_of_positions_are_no_longer_than_the_learning_rate():
    """Adam's first step is lr * sign(g) for any dense g, and longer if pieces of g are squared."""
    rate, model = 1e-2, small()
    model.compile(
        keras.optimizers.Adam(rate, epsilon=1e-12),
        keras.losses.SparseCategoricalCrossentropy(**CROSSENTROPY),
    )
    positions = model.get_layer("position_embedding").positions
    before = ops.convert_to_numpy(positions).copy()
    tokens, _ = padded(texts_of(*[6] * 8), 9, "mixed")
    model.fit(tokens, np.roll(tokens, -1, axis=1), batch_size=8, verbose=0)
    step = np.abs(ops.convert_to_numpy(positions) - before)
    assert 0.9 * rate < step[:6].max() < 1.01 * rate
    assert not step[6:].any(), "only padding is there"


@pytest.mark.every_backend
@pytest.mark.skipif(BACKEND != "tensorflow", reason="elsewhere shapes are known")
def test_a_dataset_of_unknown_lengths():
    import tensorflow as tf

    model = small(feed_forward=KINDS["moe"])
    model.compile("sgd", keras.losses.SparseCategoricalCrossentropy(**CROSSENTROPY))
    signature = tf.TensorSpec((None,), tf.int32)
    data = tf.data.Dataset.from_generator(lambda: texts_of(3, 6, 2, 8), output_signature=signature)
    data = data.padded_batch(2, padding_values=PADDING)
    assert data.element_spec.shape == (None, None)
    data = data.map(lambda batch: (batch, batch)).apply(tf.data.experimental.assert_cardinality(2))
    history = model.fit(data, verbose=0).history
    assert np.isfinite(history["loss"]).all()


# === Saving, structure ===


@pytest.mark.every_backend
def test_comes_back_from_a_file(tmp_path):
    model = small(feed_forward="moe", feed_forward_arguments={"num_experts": 4})
    tokens, mask = padded(texts_of(6, 3, 0), 9, "left")
    model.save(tmp_path / "decoder.keras")
    loaded = keras.saving.load_model(tmp_path / "decoder.keras")
    assert loaded.get_layer("token_embedding").padding_id == PADDING
    expected = model.predict(tokens, verbose=0)
    np.testing.assert_array_equal(loaded.predict(tokens, verbose=0), expected)
    mask[0, 5] = False
    np.testing.assert_array_equal(
        *(ops.convert_to_numpy(each(tokens, mask=mask)) for each in (loaded, model))
    )


@pytest.mark.every_backend
@pytest.mark.skipif(BACKEND != "tensorflow", reason="a SavedModel is TensorFlow's")
def test_an_exported_model_knows_its_padding(tmp_path):
    import tensorflow as tf

    model = small(feed_forward=KINDS["moe"])
    model.export(tmp_path / "served", verbose=False)
    served = tf.saved_model.load(tmp_path / "served")
    for width in (9, 12):
        tokens, _ = padded(texts_of(6, 3, 0), width, "left")
        helpers.assert_close(served.serve(tokens), model.predict(tokens, verbose=0), f"{width}")


def test_weights_are_named_as_without_padding():
    def paths(model):
        return [weight.path for weight in model.weights]

    model = small()
    assert paths(model) == paths(small(None))
    assert paths(model)[:2] == ["token_embedding/embeddings", "position_embedding/positions"]
    assert isinstance(model.get_layer("token_embedding"), MaskedEmbedding)
    assert isinstance(model.get_layer("position_embedding"), PositionEmbedding)


def test_padding_costs_no_flops_of_its_own():
    feed_forward = KINDS["moe"]
    flops = [active_flops(small(each, feed_forward=feed_forward), (10,)) for each in (None, 3)]
    assert flops[0] == flops[1] > 0


@pytest.mark.parametrize("padding_id", [-1, VOCABULARY, 1.0, True, "0"])
def test_padding_is_an_id(padding_id):
    with pytest.raises(
        ValueError,
        match=r"`padding_id` must be an integer between 0 and vocabulary_size - 1=10\. Received: p",
    ):
        small(padding_id)
