"""The Vision Transformer: sizes of the papers, values from the equations, where mixtures go."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import layers
from keras_moe.models import PositionEmbedding, QKNormAttention, vit
from tests.helpers import randomize_weights
from tests.oracle import soft_moe, transformer

pytestmark = pytest.mark.one_backend("made of layers that are tested everywhere")

BACKEND = keras.backend.backend()
SMALL = {"patch_size": 2, "width": 12, "depth": 2, "num_heads": 3, "mlp_dim": 20}


def small(input_shape=(6, 4, 3), num_classes=5, **arguments):
    return vit(input_shape, num_classes, **{**SMALL, **arguments})


def mixtures_of(model):
    kinds = (layers.MoE, layers.SoftMoE)
    return [layer.name for layer in model.layers if isinstance(layer, kinds)]


# === Sizes ===


def weights_without_allocation(**arguments):
    """The trainable parameters of a model whose weights are never made."""
    with keras.StatelessScope(initialize_variables=False):
        model = vit(**arguments)
        return sum(math.prod(weight.shape) for weight in model.trainable_weights)


@pytest.mark.parametrize(
    ("arguments", "millions"),
    [
        # Dosovitskiy et al. 2020, table 1, and Touvron et al. 2020, table 1: 1,000 classes.
        ({"size": "Ti", "num_classes": 1000}, 5.7),
        ({"size": "S", "num_classes": 1000}, 22.0),
        ({"size": "B", "num_classes": 1000}, 86.6),
        ({"size": "L", "num_classes": 1000}, 304.3),
        ({"size": "H", "num_classes": 1000, "patch_size": 14}, 632.0),
        # Puigcerver et al. 2023, table 8: JFT's 29,593 classes.
        ({"size": "S", "num_classes": 29_593}, 33.1),
        (
            {
                "size": "S",
                "num_classes": 29_593,
                "feed_forward": "soft_moe",
                "feed_forward_arguments": {"num_experts": 128},
            },
            933.7,
        ),
    ],
)
def test_parameters_are_the_papers(arguments, millions):
    counted = weights_without_allocation(input_shape=(224, 224, 3), **arguments)
    assert round(counted / 1e6, 1) == millions


def test_parameters_of_s16_by_hand():
    width, hidden, patches, classes = 384, 1536, 14 * 14, 29_593
    embedding = 16 * 16 * 3 * width + width + patches * width
    attention = 4 * (width * width + width)
    expert = 2 * width * hidden + hidden + width
    norm = 2 * width
    head = width * classes + classes
    dense = embedding + 12 * (attention + expert + 2 * norm) + norm + head
    router = width * 128 + 1  # phi with one slot an expert, and the scale
    soft = dense + 6 * (127 * expert + router)

    shared = {"input_shape": (224, 224, 3), "num_classes": classes, "size": "S"}
    assert weights_without_allocation(**shared) == dense
    assert (
        weights_without_allocation(
            **shared, feed_forward="soft_moe", feed_forward_arguments={"num_experts": 128}
        )
        == soft
    )


def test_a_size_can_be_changed_in_part():
    model = vit((8, 8, 1), 3, size="Ti", patch_size=4, depth=1, mlp_dim=10)
    assert model.get_layer("block_0_mlp_hidden").units == 10
    assert model.get_layer("encoder_norm").output.shape == (None, 4, 192)


# === Values ===


def forward(images, weights, *, qk_norm, soft_block):
    """The small ViT once more, in float64."""
    batch, height, width, channels = images.shape
    side = SMALL["patch_size"]
    patches = images.reshape(batch, height // side, side, width // side, side, channels)
    patches = patches.transpose(0, 1, 3, 2, 4, 5)  # row-major over patches
    patches = patches.reshape(batch, -1, side * side * channels)
    kernel = weights["patch_embedding/kernel"].reshape(side * side * channels, -1)
    x = patches @ kernel + weights["patch_embedding/bias"] + weights["position_embedding/positions"]

    def mix(y, own):
        return soft_moe.run(y, own, np.zeros_like(y), activation="gelu")[0]

    mixtures = {soft_block: (f"block_{soft_block}_soft_moe", mix)}
    x = transformer.blocks(x, weights, SMALL["depth"], mixtures=mixtures, qk_norm=qk_norm)
    pooled = transformer.layer_norm(x, weights, "encoder_norm").mean(axis=1)
    return transformer.softmax(pooled @ weights["head/kernel"] + weights["head/bias"])


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("soft_block", [None, 1])
def test_values_are_the_equations(qk_norm, soft_block):
    mixture = {}
    if soft_block is not None:
        mixture = {"feed_forward": "soft_moe", "feed_forward_arguments": {"num_experts": 3}}
    model = small(qk_norm=qk_norm, **mixture)
    randomize_weights(model, seed=3, size=0.5)
    images = 3 * np.random.default_rng(0).normal(size=(4, 6, 4, 3)).astype("float32")
    weights = {
        weight.path: ops.convert_to_numpy(weight).astype("float64")
        for weight in model.trainable_weights
    }
    expected = forward(images.astype("float64"), weights, qk_norm=qk_norm, soft_block=soft_block)
    np.testing.assert_allclose(model.predict(images, verbose=0), expected, rtol=2e-4, atol=1e-6)
    assert np.ptp(expected, axis=0).max() > 0.05, "images that all give the same prove nothing"


# === Where mixtures go ===


@pytest.mark.parametrize(
    ("depth", "moe_layers", "blocks"),
    [
        (4, "last_half", [2, 3]),
        (5, "last_half", [3, 4]),
        (1, "last_half", []),
        (4, 1, [0, 1, 2, 3]),
        (5, 2, [1, 3]),
        (4, [3, 0], [0, 3]),
        (4, (), []),
    ],
)
def test_moe_layers(depth, moe_layers, blocks):
    model = small(
        depth=depth,
        moe_layers=moe_layers,
        feed_forward="moe",
        feed_forward_arguments={"num_experts": 2},
    )
    assert mixtures_of(model) == [f"block_{block}_moe" for block in blocks]
    dense = [name for layer in model.layers if (name := layer.name).endswith("mlp_hidden")]
    assert len(dense) == depth - len(blocks)


def test_named_feed_forwards_take_arguments_over_defaults():
    soft = small(feed_forward="soft_moe", feed_forward_arguments={"num_experts": 3}, dropout=0.1)
    soft = soft.get_layer("block_1_soft_moe")
    assert (soft.num_experts, soft.hidden_dim, soft.dropout) == (3, 20, 0.1)
    switch = small(
        activation="silu",
        feed_forward="switch",
        feed_forward_arguments={"num_experts": 4, "hidden_dim": 7, "activation": "relu"},
    ).get_layer("block_1_switch")
    assert isinstance(switch, layers.SwitchFFN)
    assert (switch.hidden_dim, switch.activation) == (7, keras.activations.relu)


def test_any_factory_of_layers():
    asked = []

    def factory(block):
        asked.append(block)
        return keras.layers.Dense(12, name=f"linear_{block}")

    model = small(depth=3, feed_forward=factory, moe_layers=[0, 2])
    assert asked == [0, 2]
    assert model.get_layer("linear_0") is not model.get_layer("linear_2")
    assert not [layer for layer in model.layers if layer.name == "block_0_mlp_hidden"]


def test_features_logits_and_dropout():
    assert small(num_classes=None).output.shape == (None, 12)
    logits = small(classifier_activation=None)
    assert logits.get_layer("head").activation is keras.activations.linear
    names = {layer.name for layer in small(dropout=0.1).layers}
    assert {"embedding_dropout", "block_1_attention_dropout", "block_1_mlp_hidden_dropout"} <= names
    assert not [name for name in {layer.name for layer in small().layers} if "dropout" in name]


def test_the_head_is_float32_under_mixed_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = small(feed_forward="moe", feed_forward_arguments={"num_experts": 2})
    assert keras.backend.standardize_dtype(model.output.dtype) == "float32"
    assert keras.backend.standardize_dtype(model.get_layer("encoder_norm").output.dtype) == (
        "bfloat16"
    )


# === Training and saving ===


@pytest.mark.parametrize(
    "feed_forward", [pytest.param("soft_moe", marks=pytest.mark.every_backend), "moe"]
)
def test_fits_and_comes_back(feed_forward, tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, size=32)
    images = rng.normal(size=(32, 4, 4, 1)).astype("float32") + labels[:, None, None, None]
    model = small(
        (4, 4, 1),
        3,
        qk_norm=True,
        feed_forward=feed_forward,
        feed_forward_arguments={"num_experts": 4},
    )
    model.compile(
        keras.optimizers.Adam(1e-2),
        "sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=BACKEND != "torch",
    )
    history = model.fit(images, labels, batch_size=16, epochs=8, verbose=0).history
    assert history["loss"][-1] < 0.7 * history["loss"][0]
    model.save(tmp_path / "vit.keras")
    loaded = keras.saving.load_model(tmp_path / "vit.keras")
    np.testing.assert_array_equal(
        loaded.predict(images, verbose=0), model.predict(images, verbose=0)
    )


def test_gradients_reach_every_weight():
    model = small(qk_norm=True, feed_forward="soft_moe", feed_forward_arguments={"num_experts": 3})
    randomize_weights(model, seed=1, size=0.5)
    before = {weight.path: ops.convert_to_numpy(weight) for weight in model.trainable_weights}
    images = np.random.default_rng(0).normal(size=(8, 6, 4, 3)).astype("float32")
    model.compile(keras.optimizers.SGD(1.0), "sparse_categorical_crossentropy")
    model.fit(images, np.arange(8) % 5, batch_size=8, verbose=0)
    for weight in model.trainable_weights:
        if weight.path.endswith("attention/key/bias") and "norm" not in weight.path:
            continue  # moves nothing but the norm's mean
        change = np.abs(ops.convert_to_numpy(weight) - before[weight.path]).max()
        assert change > 1e-7, weight.path


# === Bad input ===

BAD = [
    ({"input_shape": (30, 28, 3), "patch_size": 4}, r"whole patches of 4 x 4 .*\(30, 28, 3\)"),
    ({"input_shape": (28, 28)}, r"`input_shape` must be \(height, width, channels\).*\(28, 28\)"),
    ({"input_shape": (None, 4, 3)}, r"`input_shape` must be .* positive integers"),
    ({"patch_size": 0}, "`patch_size` must be a positive integer. Received: patch_size=0"),
    ({"num_classes": 0}, "`num_classes` must be a positive integer. Received: num_classes=0"),
    ({"size": "XL"}, "`size` must be one of .*'Ti'.* Received: size='XL'"),
    ({"width": None}, "`width` must be a positive integer where `size` is None"),
    ({"depth": 0}, "`depth` must be a positive integer. Received: depth=0"),
    ({"width": 13}, "`width` must be a multiple of `num_heads`. Received: width=13, num_heads=3"),
    ({"mlp_dim": -1}, "`mlp_dim` must be a positive integer. Received: mlp_dim=-1"),
    ({"dropout": 1.0}, r"`dropout` must be a number in \[0, 1\). Received: dropout=1.0"),
    (
        {"moe_layers": [0, 2]},
        "`moe_layers` must be an integer between 0 and depth - 1=1. Received: .*=2",
    ),
    (
        {"moe_layers": [-1]},
        "`moe_layers` must be an integer between 0 and depth - 1=1. Received: .*=-1",
    ),
    ({"moe_layers": [1, 1]}, r"`moe_layers` must name a block once. Received: .*\[1, 1\]"),
    ({"moe_layers": 3}, "`moe_layers` must be an integer between 1 and depth=2. Received: .*=3"),
    ({"moe_layers": 0}, "`moe_layers` must be an integer between 1 and depth=2. Received: .*=0"),
    ({"moe_layers": True}, "`moe_layers` must be an integer between 1 and depth=2"),
    ({"moe_layers": "first"}, "`moe_layers` must be 'last_half', an integer n .*'first'"),
    ({"moe_layers": 1.5}, "`moe_layers` must be 'last_half', an integer n .*1.5"),
    (
        {"feed_forward": "mixture"},
        r"`feed_forward` must be one of \['dense', 'moe', 'soft_moe', 'switch'\].*'mixture'",
    ),
    ({"feed_forward": keras.layers.Dense(12)}, "one layer for all blocks would share"),
    ({"feed_forward": "soft_moe"}, "`feed_forward_arguments` must give the `num_experts` of 'soft"),
    (
        {"feed_forward_arguments": {"num_experts": 4}},
        "`feed_forward_arguments` belong to a `feed_forward` of the names .*'dense'",
    ),
    (
        {"feed_forward": "moe", "feed_forward_arguments": {"num_experts": 2, "top_k": 3}},
        "integer between 1 and num_experts=2. Received: top_k=3",
    ),
    ({"feed_forward": lambda block: None}, "`feed_forward` must return a Keras layer"),
    (
        {"feed_forward": lambda block: keras.layers.Dense(5)},
        r"must return a layer that keeps the shape \(None, 6, 12\). Received: .*\(None, 6, 5\)",
    ),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_positions_need_a_known_length():
    with pytest.raises(ValueError, match=r"expects inputs \(batch, n, d\), n known"):
        PositionEmbedding()(keras.KerasTensor((2, None, 4)))


def test_positions_up_to_a_length():
    layer = PositionEmbedding(max_length=5)
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    outputs = ops.convert_to_numpy(layer(x))
    positions = ops.convert_to_numpy(layer.positions)
    assert positions.shape == (5, 4)
    np.testing.assert_allclose(outputs, x + positions[:3], rtol=1e-6)
    assert layer(keras.KerasTensor((2, None, 4))).shape == (2, None, 4)
    with pytest.raises(ValueError, match=r"at most max_length=5 places. Received: n=6"):
        layer(np.zeros((2, 6, 4), "float32"))
    with pytest.raises(ValueError, match=r"`max_length` must be a positive integer.*=0"):
        PositionEmbedding(max_length=0)


def test_sublayers_come_back_from_their_config():
    attention = QKNormAttention(2, 4, dropout=0.1)
    again = QKNormAttention.from_config(attention.get_config())
    assert again.get_config() == attention.get_config()
    positions = PositionEmbedding("zeros", max_length=3)
    again = PositionEmbedding.from_config(positions.get_config())
    assert again.get_config() == positions.get_config()
