"""`slot_patches` shows what slots are made of, and no more than there is."""

import keras
import numpy as np
import pytest

from keras_moe import layers, plots

pytestmark = pytest.mark.one_backend("pictures are of NumPy arrays")

IMAGES = np.random.default_rng(0).normal(size=(5, 4, 4, 1)).astype("float32")


def model_of(layer):
    """A model of images of 4 x 4 x 1 whose pixels of 2 x 2 are the tokens."""
    inputs = keras.Input((4, 4, 1))
    x = keras.layers.Conv2D(6, 2, strides=2, data_format="channels_last")(inputs)
    return keras.Model(inputs, layer(keras.layers.Reshape((4, 6))(x)))


def dispatch_of(model, layer):
    tokens = keras.Model(model.input, layer.input)(IMAGES)
    routing = layer(tokens, return_routing=True)[1]
    return keras.ops.convert_to_numpy(routing.dispatch).reshape(len(IMAGES), 4, -1)


def panels_of(figure, rows, columns):
    return np.reshape(figure.axes[: rows * columns], (rows, columns))


def heat(panel):
    return np.asarray(panel.images[0].get_array())


def test_shares_of_patches_over_an_even_one(tmp_path):
    layer = layers.SoftMoE(
        3, 8, slots_per_expert=2, scale_initializer=keras.initializers.Constant(6)
    )
    model = model_of(layer)
    titles = list("abc$e")
    figure = plots.slot_patches(model, IMAGES, slots=3, show=[4, 1], titles=titles, batch_size=2)
    over_even = 4 * dispatch_of(model, layer)
    peaks = over_even.max(axis=1).mean(axis=0)
    panels = panels_of(figure, 3, 4)
    slots = []
    for panel in panels[0, 1:]:
        name, peak = panel.get_title().split("\n")
        expert, slot = name.removeprefix("slot ").split(".")
        slots.append(2 * int(expert) + int(slot))
        assert peak == f"peak {peaks[slots[-1]]:.1f}x"
    assert slots[0] == peaks.argmax() and len(set(slots)) == 3
    distance = np.square(over_even[[4, 1]] - over_even[[4, 1]][..., slots[:1]]).sum(axis=(0, 1))
    assert slots[1] == distance.argmax()
    for row, expected in enumerate([over_even[4], over_even[1], over_even.mean(axis=0)]):
        for panel, slot in zip(panels[row, 1:], slots, strict=True):
            drawn = heat(panel)
            expected_heat = expected[:, slot].reshape(2, 2).repeat(2, 0).repeat(2, 1)
            low = panel.images[0].norm.vmin
            np.testing.assert_allclose(drawn, np.maximum(expected_heat, low), rtol=1e-5)
    assert [panel.get_ylabel() for panel in panels[:, 0]] == ["e", "b", "mean of\n5 images"]
    figure.savefig(tmp_path / "slots.png")
    assert (tmp_path / "slots.png").stat().st_size > 4000


def test_slots_that_average_look_so():
    model = model_of(layers.SoftMoE(3, 8, mixing="uniform_soft"))
    figure = plots.slot_patches(model, IMAGES)
    panels = panels_of(figure, 6, 4)
    assert all(panel.get_title().endswith("peak 1.0x") for panel in panels[0, 1:])
    drawn = panels[0, 1].images[0]
    np.testing.assert_allclose(heat(panels[0, 1]), 1.0, rtol=1e-6)
    assert (drawn.norm.vmin, drawn.norm.vmax) == (0.5, 2.0)
    grey = drawn.cmap(drawn.norm(heat(panels[0, 1])))[..., :3]
    assert grey.min() > 0.95  # white, the middle of the colours


def test_what_has_no_slots_to_show_is_refused():
    with pytest.raises(ValueError, match="must have a `SoftMoE` that is not causal"):
        plots.slot_patches(model_of(layers.MoE(3, 8)), IMAGES)
    with pytest.raises(ValueError, match="must have a `SoftMoE` that is not causal"):
        plots.slot_patches(model_of(layers.SoftMoE(3, 8, causal=True)), IMAGES)
    model = model_of(layers.SoftMoE(3, 8))
    with pytest.raises(ValueError, match=r"places of the 5 images. Received: show=\[5\]"):
        plots.slot_patches(model, IMAGES, show=[5])
    with pytest.raises(ValueError, match="one entry for each of 5 images"):
        plots.slot_patches(model, IMAGES, titles=["a"])
