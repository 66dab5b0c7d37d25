"""Masks of images, of histories and of the layers that models are made of."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.models import (
    HistoryMean,
    MaskedEmbedding,
    PositionEmbedding,
    features,
    multitask_ranker,
    task_gates,
    vit,
)
from tests import helpers
from tests.oracle import moe, transformer

pytestmark = pytest.mark.one_backend("masks are Keras's on every backend")

# === Images ===

SMALL = {"patch_size": 2, "width": 12, "depth": 2, "num_heads": 3, "mlp_dim": 20}


def small_vit(**arguments):
    model = vit((4, 6, 3), 5, qk_norm=True, **SMALL, **arguments)
    helpers.randomize_weights(model, seed=3, size=0.5)
    return model


def images_and_masks():
    """Whole, cut on two sides, in part a mere corner of a patch, and nothing at all."""
    images = np.random.default_rng(0).normal(size=(4, 4, 6, 3)).astype("float32")
    masks = np.zeros((4, 4, 6), bool)
    masks[0], masks[1, 2:, :4], masks[2, :3, 3:] = True, True, True
    return np.where(masks[..., None], images, np.nan), masks


@pytest.mark.parametrize("moe_block", [None, 1])
def test_what_is_no_image_is_as_if_it_were_not_there(moe_block):
    arguments = {"num_experts": 4}
    mixture = {} if moe_block is None else {"feed_forward": "moe", "moe_layers": [moe_block]}
    if mixture:
        mixture["feed_forward_arguments"] = arguments
    model = small_vit(**mixture)
    images, masks = images_and_masks()
    outputs, losses = helpers.call(model, images, mask=masks, training=True)
    weights = {v.path: ops.convert_to_numpy(v).astype("float64") for v in model.trainable_weights}

    def mix(y, own):
        return moe.run(y, own).outputs

    kernel = weights["patch_embedding/kernel"].reshape(12, -1)
    for image, mask, output in zip(images[:3], masks[:3], outputs[:3], strict=True):
        pixels = np.where(mask[..., None], image, 0.0).astype("float64").reshape(2, 2, 3, 2, 3)
        patches = pixels.transpose(0, 2, 1, 3, 4).reshape(6, 12)
        is_seen = mask.reshape(2, 2, 3, 2).any(axis=(1, 3)).reshape(6)
        x = patches @ kernel + weights["patch_embedding/bias"]
        x = (x + weights["position_embedding/positions"])[is_seen][None]
        mixtures = {moe_block: (f"block_{moe_block}_moe", mix)}
        x = transformer.blocks(x, weights, 2, mixtures=mixtures, qk_norm=True)
        pooled = transformer.layer_norm(x, weights, "encoder_norm").mean(axis=1)
        expected = transformer.softmax(pooled @ weights["head/kernel"] + weights["head/bias"])
        np.testing.assert_allclose(output, expected[0], rtol=2e-4, atol=1e-6)
    nothing = transformer.softmax(weights["head/bias"][None])[0]
    np.testing.assert_allclose(outputs[3], nothing, rtol=1e-5)
    assert np.isfinite(losses).all()
    if moe_block is not None:
        counts = model.get_layer(f"block_{moe_block}_moe").running_counts()
        assert counts["decisions"] == 6 + 2 + 4


def test_whole_images_are_as_without_a_mask():
    model = small_vit(feed_forward="soft_moe", feed_forward_arguments={"num_experts": 3})
    images = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype("float32")
    expected, _ = helpers.call(model, images)
    outputs, _ = helpers.call(model, images, mask=np.ones((2, 4, 6), bool))
    helpers.assert_close(outputs, expected, "outputs")


def test_a_vit_with_a_mask_comes_back(tmp_path):
    model = small_vit()
    images, masks = images_and_masks()
    model.save(tmp_path / "vit.keras")
    loaded = keras.saving.load_model(tmp_path / "vit.keras")
    expected = ops.convert_to_numpy(model(images, mask=masks))
    np.testing.assert_array_equal(ops.convert_to_numpy(loaded(images, mask=masks)), expected)


def test_masks_of_images_are_of_pixels():
    with pytest.raises(ValueError, match=r"one entry per token, shape \(2, 4, 6\)"):
        small_vit()(np.zeros((2, 4, 6, 3), "float32"), mask=np.ones((2, 6), bool))


# === Rankers ===

TASKS = {"click": "binary", "stars": "regression"}


def ranker(**arguments):
    described = [
        features.Categorical("movie", 9, dim=4),
        features.History("recent", length=5, of="movie"),
        features.MultiHot("genres", 3, dim=4),
        features.Numeric("scalars", 2, mean=[1.0, -2.0], variance=[4.0, 0.0]),
    ]
    pairs = [("recent", "movie"), ("genres", "movie")]
    model = multitask_ranker(described, TASKS, interactions=pairs, num_experts=3, **arguments)
    helpers.randomize_weights(model, seed=3, size=0.5)
    return model


def examples(count=6):
    rng = np.random.default_rng(0)
    return {
        "movie": rng.integers(1, 9, count).astype("int32"),
        "recent": rng.integers(0, 9, (count, 5)).astype("int32"),
        "genres": rng.integers(0, 2, (count, 3)).astype("float32"),
        "scalars": rng.normal(size=(count, 2)).astype("float32"),
    }


def arrays(outputs):
    return keras.tree.map_structure(ops.convert_to_numpy, outputs)


@pytest.mark.every_backend
@pytest.mark.parametrize("trunk", ["mmoe", "shared_bottom"])
def test_masked_places_of_a_history_are_padding(trunk):
    model, batch = ranker(trunk=trunk), examples()
    mask = np.arange(5)[None] >= np.array([[0], [1], [2], [3], [4], [5]])
    outputs = arrays(model(batch, mask={"recent": mask}))
    shorter = {**batch, "recent": np.where(mask, batch["recent"], 0)}
    expected, without = arrays(model(shorter)), arrays(model(batch))
    for task in TASKS:
        helpers.assert_close(outputs[task], expected[task], task)
        assert np.abs(outputs[task] - without[task])[3:].max() > 1e-3
    if trunk == "mmoe":
        gates = task_gates(model)
        masked = arrays(gates(batch, mask={"recent": mask}))
        helpers.assert_close(masked, arrays(gates(shorter)), "gates")


def test_masks_of_inputs_that_are_no_sequences():
    message = (
        r"`mask` must be a dict of inputs that are sequences of ids, of \['recent'\], to masks"
    )
    for mask in ({"history": np.ones((6, 5), bool)}, {"movie": np.ones(6, bool)}, np.ones((6, 5))):
        with pytest.raises(ValueError, match=message):
            ranker()(examples(), mask=mask)
    outputs = ranker()(examples(), mask={"movie": None})
    assert set(outputs) == set(TASKS)


# === Layers ===


def test_an_embedding_hands_on_what_is_padding():
    ids = np.array([[3, 3, 1, 3], [0, 2, 3, 4]])
    given = np.array([[1, 1, 1, 1], [0, 1, 1, 1]], bool)

    def masks(layer):
        pooled = keras.layers.GlobalAveragePooling1D()
        inputs = keras.Input((None,), dtype="int32")
        model = keras.Model(inputs, pooled(layer(inputs)))
        table = ops.convert_to_numpy(layer.embeddings)[ids]
        return model, table

    for padding_id, expected in ((3, ids != 3), (0, ids != 0)):
        model, table = masks(MaskedEmbedding(5, 2, padding_id))
        means = [row[kept].mean(axis=0) for row, kept in zip(table, expected, strict=True)]
        np.testing.assert_allclose(model.predict(ids, verbose=0), means, rtol=1e-5)
        found = model.layers[1].compute_mask(ids, given)
        np.testing.assert_array_equal(ops.convert_to_numpy(found), expected & given)
    assert MaskedEmbedding(5, 2).compute_mask(ids) is None
    found = MaskedEmbedding(5, 2).compute_mask(ids, given.astype("int32"))
    np.testing.assert_array_equal(ops.convert_to_numpy(found), given)


def test_an_embedding_comes_back_from_its_config():
    layer = MaskedEmbedding(5, 2, 3, embeddings_initializer="ones", name="ids")
    config = json.loads(json.dumps(layer.get_config()))
    again = MaskedEmbedding.from_config(config)
    assert again.padding_id == 3
    assert again.get_config() == layer.get_config()


def test_an_embedding_is_quantized_as_kerass_own():
    inputs = keras.Input((None,), dtype="int32")
    model = keras.Model(inputs, MaskedEmbedding(5, 8, 3)(inputs))
    ids = np.array([[3, 1, 2]])
    before = model.predict(ids, verbose=0)
    model.layers[1].quantize("int8")
    table = model.layers[1].variables[0]
    assert keras.backend.standardize_dtype(table.dtype) == "int8"
    np.testing.assert_allclose(model.predict(ids, verbose=0), before, atol=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MaskedEmbedding(5, 2, 5), r"`padding_id` must be an integer between 0 and .*=4\."),
        (lambda: MaskedEmbedding(5, 2, mask_zero=True), r"`padding_id` must say .* mask_zero=True"),
    ],
)
def test_bad_embeddings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


MASK = np.array([[0, 0, 1, 0, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)


@pytest.mark.parametrize("arguments", [{}, {"max_length": 8}])
def test_positions_start_at_the_first_token(arguments):
    x = np.random.default_rng(0).normal(size=(3, 5, 4)).astype("float32")
    layer = PositionEmbedding(**arguments)
    layer.build(x.shape)
    outputs, _ = helpers.call(layer, x, mask=MASK)
    positions = ops.convert_to_numpy(layer.positions)
    places = [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4], [0] * 5]
    np.testing.assert_allclose(outputs, x + positions[places], rtol=1e-6)
    grid = PositionEmbedding(counts_padding=True, **arguments)
    grid.build(x.shape)
    outputs, _ = helpers.call(grid, x, mask=MASK)
    np.testing.assert_allclose(outputs, x + ops.convert_to_numpy(grid.positions)[:5], rtol=1e-6)


@pytest.mark.parametrize("is_masked", [False, True])
def test_gradients_of_positions_add_up_in_bfloat16(is_masked):
    layer = PositionEmbedding(max_length=3, dtype="mixed_bfloat16")
    x = np.zeros((1000, 2, 1), "float32")
    layer.build(x.shape)
    mask = {"mask": np.tile([False, True], (1000, 1))} if is_masked else {}
    _, _, gradients = helpers.values_and_gradients(
        layer, x, np.ones_like(x), lambda outputs: ops.cast(outputs, "float32"), **mask
    )
    expected = [2000.0, 0.0, 0.0] if is_masked else [1000.0, 1000.0, 0.0]
    np.testing.assert_array_equal(gradients["positions"][:, 0], expected)


def test_a_mean_of_a_history_takes_masks_of_vectors_and_of_ids():
    vectors = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    ids = np.array([[1, 2, 0], [5, 6, 7]])
    masks = [np.array([[1, 0, 1], [1, 1, 1]], bool), np.array([[1, 1, 1], [1, 1, 0]], bool)]
    outputs = HistoryMean()([vectors, ids], mask=[ops.convert_to_tensor(each) for each in masks])
    expected = [vectors[0, 0], vectors[1, :2].mean(axis=0)]
    np.testing.assert_allclose(ops.convert_to_numpy(outputs), expected, rtol=1e-6)
    embedded = keras.layers.Embedding(9, 4, mask_zero=True)(ids)
    means = ops.convert_to_numpy(HistoryMean()([embedded, ids]))
    assert np.isfinite(means).all()
