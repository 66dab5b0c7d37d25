"""The text of `token_experts` has the colours, bars and numbers of the routing."""

import keras
import numpy as np
import pytest
from matplotlib.colors import to_rgb

from keras_moe import layers, plots
from keras_moe.plots._canvas import FILLS, tint

pytestmark = pytest.mark.one_backend("pictures are of NumPy arrays")

TEXTS = ["a", " b", "$1$", "\n", "long word", ""]


def model_of(layer, scores):
    """A model whose token t has the logits `scores[t]`."""
    scores = np.asarray(scores, "float32")
    inputs = keras.Input((None,), dtype="int32")
    embedding = keras.layers.Embedding(*scores.shape)
    outputs = layer(embedding(inputs))
    embedding.embeddings.assign(scores)
    layer.router.kernel.assign(np.eye(scores.shape[1], dtype="float32"))
    return keras.Model(inputs, outputs), np.arange(len(scores))[None]


def texts_of(figure):
    return [text.get_text() for text in figure.axes[0].texts]


def fills(figure, height):
    """The colours and widths of the boxes of a height, in order."""
    boxes = [box for box in figure.axes[0].patches if box.get_height() == pytest.approx(height)]
    return [to_rgb(box.get_facecolor()) for box in boxes], [box.get_width() for box in boxes]


def is_close(first, second):
    return np.allclose(first, second, atol=1e-6)


def test_colours_bars_and_numbers(tmp_path):
    scores = np.zeros((6, 4))
    scores[np.arange(6), [3, 0, 1, 2, 3, 0]] = 4.0
    scores[np.arange(6), [1, 1, 2, 3, 0, 2]] = 3.0
    model, tokens = model_of(layers.MoE(4, 8, top_k=2, name="moe"), scores)
    figure = plots.token_experts(model, tokens, TEXTS)
    shown = texts_of(figure)
    assert shown[0] == "Which expert each token takes: moe"
    assert shown[1:19] == [
        *("a", "3", "1", "·b", "0", "1", "$1$", "1", "2"),
        *("↵", "2", "3", "long·word", "3", "0", "∅", "0", "2"),
    ]
    assert shown[-4:] == ["0  33 %", "1  17 %", "2  17 %", "3  33 %"]
    colours, _ = fills(figure, 17.0)
    for colour, expert in zip(colours, [3, 0, 1, 2, 3, 0], strict=True):
        assert is_close(colour, tint(FILLS[expert]))
    colours, widths = fills(figure, 4.0)  # a track, and its two parts
    assert is_close(colours[1], to_rgb(FILLS[3])) and is_close(colours[2], to_rgb(FILLS[1]))
    first = 1 / (1 + np.exp(-1.0))
    np.testing.assert_allclose(np.divide(widths[1:3], widths[0]), [first, 1 - first], rtol=1e-5)
    lines = {
        round(text.get_position()[1]) for text in figure.axes[0].texts if text.get_text() in "a∅"
    }
    assert len(lines) == 2  # one behind the line end
    figure.savefig(tmp_path / "tokens.png")
    assert (tmp_path / "tokens.png").stat().st_size > 4000


def test_more_experts_than_colours_give_them_to_the_most_used():
    scores = 4.0 * np.eye(12)[[11, 11, 3, 4, 5, 6, 7, 8, 9]]
    model, tokens = model_of(layers.MoE(12, 8, top_k=1), scores)
    figure = plots.token_experts(model, tokens, list("abcdefghi"))
    assert texts_of(figure)[-8:] == [
        *("3  11 %", "4  11 %", "5  11 %", "6  11 %", "7  11 %", "8  11 %", "11  22 %"),
        "others  11 %",
    ]
    colours, _ = fills(figure, 17.0)
    assert is_close(colours[0], tint(FILLS[6])) and is_close(colours[-1], tint(FILLS[7]))


def test_dropped_tokens_are_hatched():
    model, tokens = model_of(
        layers.MoE(4, 8, top_k=1, capacity_factor=1.0), 4.0 * np.eye(4)[[2, 2, 2, 2]]
    )
    figure = plots.token_experts(model, tokens, list("abcd"))
    hatched = [box.get_hatch() is not None for box in figure.axes[0].patches]
    assert sum(hatched) == 3 + 1  # and the key
    assert texts_of(figure)[-2:] == ["2  25 %", "none  75 %"]


def test_soft_layers_show_where_most_weight_goes():
    layer = layers.SoftMoE(3, 8, slots_per_expert=2)
    inputs = keras.Input((4, 6))
    model = keras.Model(inputs, layer(inputs))
    x = np.random.default_rng(0).normal(size=(1, 4, 6)).astype("float32")
    figure = plots.token_experts(model, x, list("abcd"), choices=1)
    combine = keras.ops.convert_to_numpy(layer(x, return_routing=True)[1].combine)
    weights = combine.sum(-1)[0]
    best = weights.argmax(-1)
    assert texts_of(figure)[2:9:2] == [str(expert) for expert in best]
    colours, _ = fills(figure, 17.0)
    for colour, expert, weight in zip(colours, best, weights.max(-1), strict=True):
        assert is_close(colour, tint(FILLS[expert], 0.55 * weight))
    means = [f"{expert}  {100 * mean:.0f} %" for expert, mean in enumerate(weights.mean(0))]
    assert texts_of(figure)[-3:] == means


def test_lines_are_broken_and_wrong_texts_refused():
    model, tokens = model_of(layers.MoE(4, 8, top_k=1), np.eye(4)[[0, 1, 2, 3]])
    figure = plots.token_experts(model, tokens, ["aaaa"] * 4, line_width=10)
    tops = [text.get_position()[1] for text in figure.axes[0].texts if text.get_text() == "aaaa"]
    assert tops[0] == tops[1] < tops[2] == tops[3]
    message = r"one string for each of the 4 tokens that 'moe\w*' decides about. Received: len"
    with pytest.raises(ValueError, match=message):
        plots.token_experts(model, tokens, ["a"])
