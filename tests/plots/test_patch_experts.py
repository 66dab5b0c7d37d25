"""The patches of `patch_experts` have the colours and numbers of the routing."""

import keras
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from keras_moe import layers, models, plots
from keras_moe.inspection.records import Record, weights_of
from keras_moe.plots._canvas import FILLS

pytestmark = pytest.mark.one_backend("pictures are of NumPy arrays")


def model_of(layer):
    """A model of images of 4 x 4 x 1 whose 2 x 2 patches are the tokens."""
    inputs = keras.Input((4, 4, 1))
    patches = keras.layers.Conv2D(6, 2, strides=2, data_format="channels_last")(inputs)
    outputs = layer(keras.layers.Reshape((4, 6))(patches))
    return keras.Model(inputs, outputs)


IMAGES = np.random.default_rng(0).normal(size=(3, 4, 4, 1)).astype("float32")


def numbers(figure, image, count):
    """The numbers in the patches of an image, which is above them."""
    across = len(figure.axes) // 2
    texts = figure.axes[across + image].texts
    assert len(texts) == count
    return [text.get_text() for text in texts]


def test_patches_have_their_experts_colours_and_numbers(tmp_path):
    layer = layers.MoE(5, 8, top_k=2)
    model = model_of(layer)
    figure = plots.patch_experts(model, IMAGES, titles=["$x", "b", "c"])
    tokens = keras.Model(model.input, layer.input)(IMAGES)
    routing = layer(tokens, return_routing=True)[1]
    experts = keras.ops.convert_to_numpy(routing.experts)[..., 0]
    low, high = IMAGES.min(), IMAGES.max()
    for image in range(3):
        assert numbers(figure, image, 4) == [str(expert) for expert in experts[image]]
        drawn = np.asarray(figure.axes[3 + image].images[0].get_array())
        brightness = 0.6 + 0.4 * (IMAGES[image] - low) / (high - low)
        colours = np.array([to_rgb(FILLS[expert]) for expert in experts[image]])
        expected = colours.reshape(2, 2, 3).repeat(2, 0).repeat(2, 1) * brightness
        np.testing.assert_allclose(drawn, expected, rtol=1e-5)
    keys = [text.get_text() for text in figure.legends[0].get_texts()]
    counts = np.bincount(experts.ravel(), minlength=5)
    assert keys == [f"{e}  {100 * n / 12:.0f} %" for e, n in enumerate(counts) if n]
    assert figure.axes[0].get_title() == "$x"
    figure.savefig(tmp_path / "patches.png")
    assert (tmp_path / "patches.png").stat().st_size > 4000


def test_patches_without_room_are_crossed_out():
    layer = layers.MoE(2, 8, top_k=1, capacity_factor=0.5)
    model = model_of(layer)
    layer.router.kernel.assign(np.zeros((6, 2), "float32"))  # all want expert 0, 3 find room
    figure = plots.patch_experts(model, IMAGES)
    shown = [number for image in range(3) for number in numbers(figure, image, 4)]
    assert shown == ["0"] * 3 + ["✗"] * 9
    keys = [text.get_text() for text in figure.legends[0].get_texts()]
    assert keys == ["0  25 %", "✗ none  75 %"]


def test_soft_layers_show_where_most_combine_weight_goes():
    layer = layers.SoftMoE(3, 8, slots_per_expert=2)
    model = model_of(layer)
    figure = plots.patch_experts(model, IMAGES)
    tokens = keras.Model(model.input, layer.input)(IMAGES)
    combine = keras.ops.convert_to_numpy(layer(tokens, return_routing=True)[1].combine)
    weights = combine.sum(-1)
    best, most = weights.argmax(-1), weights.max(-1)
    assert numbers(figure, 1, 4) == [str(expert) for expert in best[1]]
    drawn = np.asarray(figure.axes[3 + 1].images[0].get_array())
    low, high = IMAGES.min(), IMAGES.max()
    brightness = 0.6 + 0.4 * (IMAGES[1] - low) / (high - low)
    colours = np.array([to_rgb(FILLS[expert]) for expert in best[1]])
    faint = 1 - most[1][:, None] * (1 - colours)  # as opaque as its weight
    expected = faint.reshape(2, 2, 3).repeat(2, 0).repeat(2, 1) * brightness
    np.testing.assert_allclose(drawn, expected, rtol=1e-5)
    keys = [text.get_text() for text in figure.legends[0].get_texts()]
    means = weights.mean(axis=(0, 1))
    assert keys == [f"{expert}  {100 * mean:.0f} %" for expert, mean in enumerate(means)]


def test_grids_of_other_shapes():
    model = models.vit(
        (4, 8, 1), 2, patch_size=2, width=8, depth=2, num_heads=2,
        feed_forward="moe", feed_forward_arguments={"num_experts": 4},
    )  # fmt: skip
    images = np.random.default_rng(0).normal(size=(5, 4, 8, 1)).astype("float32")
    figure = plots.patch_experts(model, images, columns=2)
    assert len(figure.axes) == 2 * 3 * 2  # 5 images, 2 a row
    x, y = zip(*(text.get_position() for text in figure.axes[2].texts), strict=True)
    assert max(x) == 3.5 and max(y) == 1.5

    layer = layers.MoE(4, 8, top_k=1)
    tokens = keras.Input((7, 6))
    model = keras.Model(tokens, layer(tokens))
    x = np.random.default_rng(1).normal(size=(2, 7, 6)).astype("float32")
    with pytest.raises(ValueError, match="must be images of 1 or 3 channels"):
        plots.patch_experts(model, x[..., None].repeat(2, -1))
    pictures = np.zeros((2, 4, 6))
    with pytest.raises(
        ValueError, match=r"`patch_grid` must .* 7 tokens. Received: patch_grid=None"
    ):
        plots.patch_experts(model, x, pictures=pictures)
    figure = plots.patch_experts(model, x, pictures=pictures, patch_grid=(2, 3))
    experts = keras.ops.convert_to_numpy(layer(x, return_routing=True)[1].experts)
    assert numbers(figure, 0, 6) == [str(expert) for expert in experts[0, 1:, 0]]
    with pytest.raises(ValueError, match=r"one entry for each of 2 images. Received: pictures=1"):
        plots.patch_experts(model, x, pictures=pictures[:1], patch_grid=(2, 3))


def test_weights_of_a_record():
    fields = {
        "experts": np.array([[2, 0], [1, 2]]),
        "weights": np.array([[0.7, 0.3], [0.6, np.nan]]),
        "kept": np.array([[True, False], [True, True]]),
    }
    record = Record(layers.MoE(3, 8), fields)
    np.testing.assert_array_equal(weights_of(record), [[0, 0, 0.7], [0, 0.6, 0]])
