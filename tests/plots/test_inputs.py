"""Pictures take the inputs that the model takes, and say which they cannot."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_moe
from keras_moe import layers, plots

pytestmark = pytest.mark.one_backend("pictures are of NumPy arrays")

T, D = 4, 6
X = np.random.default_rng(0).normal(size=(10, T, D)).astype("float32")
Y = np.arange(10) % 2


def model_of(*steps):
    inputs = outputs = keras.Input((T, D))
    for step in steps:
        outputs = step(outputs)
    return keras.Model(inputs, outputs)


def sparse(name="moe", **arguments):
    return layers.MoE(4, 8, name=name, **arguments)


def matrix(figure):
    return np.ma.filled(figure.axes[0].images[0].get_array().astype(float), np.nan)


def rows(figure):
    return [label.get_text() for label in figure.axes[0].get_yticklabels()]


class Table:
    """What a data frame shows to NumPy."""

    def __init__(self, array):
        self.array, self.shape = array, array.shape

    def __array__(self, dtype=None, copy=None):
        return self.array

    def __len__(self):
        return len(self.array)


@pytest.mark.parametrize(
    "convert",
    [lambda x: x.astype("float64"), ops.convert_to_tensor, Table],
    ids=["float64", "a tensor", "a table"],
)
def test_arrays_of_other_kinds(convert):
    model = model_of(sparse())
    expected = matrix(plots.expert_load(model, X))
    np.testing.assert_allclose(matrix(plots.expert_load(model, convert(X))), expected)


def test_pixels_of_bytes():
    model, pixels = model_of(sparse()), (9 * np.abs(X)).astype("uint8")
    expected = matrix(plots.expert_load(model, pixels.astype("float32")))
    np.testing.assert_allclose(matrix(plots.expert_load(model, pixels)), expected)


@pytest.mark.parametrize("batch_size", [3, 10, 1000])
def test_any_batch_size(batch_size):
    layer = sparse()
    figure = plots.class_by_expert(model_of(layer), X, Y, batch_size=batch_size)
    experts = ops.convert_to_numpy(layer(X, return_routing=True)[1].experts)
    used = np.eye(4)[experts].sum(axis=(1, 2))
    by_class = np.array([used[each == Y].sum(axis=0) for each in range(2)])
    np.testing.assert_allclose(matrix(figure), by_class / by_class.sum(axis=1, keepdims=True))


@pytest.mark.parametrize(
    ("x", "arguments", "message"),
    [
        (X, {"batch_size": 0}, "`batch_size` must be a positive integer. Received: batch_size=0"),
        (X, {"batch_size": 2.5}, "`batch_size` must be a positive integer"),
        (X[:0], {}, r"`x` must have at least one example, .* shapes=\[\(0, 4, 6\)\]"),
        ([X, X[:3]], {}, r"as many in each array. Received: shapes=\[\(10, 4, 6\), \(3, 4, 6\)\]"),
        ({}, {}, "`x` must have at least one example"),
        (X.tolist(), {}, r"an array, or a dict or list of arrays. Received: types=\['float'\]"),
        (
            iter([X]),
            {},
            r"an array, or a dict or list of arrays. Received: types=\['list_iterator'\]",
        ),
    ],
)
def test_inputs_that_are_none(x, arguments, message):
    with pytest.raises(ValueError, match=message):
        plots.expert_load(model_of(sparse()), x, **arguments)


class TwoLengths(keras.Model):
    """Calls a layer on sequences of two lengths."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, x):
        return self.layer(x), self.layer(x[:, :2])


@pytest.mark.parametrize("is_of_one_length", [True, False])
def test_a_layer_that_is_called_twice_is_shown_by_call(is_of_one_length, tmp_path):
    layer = sparse()
    model = model_of(layer, layer) if is_of_one_length else TwoLengths(layer)
    model(X)
    assert rows(plots.expert_load(model, X, batch_size=4)) == ["moe (call 1)", "moe (call 2)"]
    with pytest.raises(ValueError, match=r"one of \['moe \(call 1\)', 'moe \(call 2\)'\]"):
        plots.class_by_expert(model, X, Y)
    second = layer(X) if is_of_one_length else X[:, :2]
    alone = model_of(layer) if is_of_one_length else keras.Sequential([layer])
    expected = matrix(plots.class_by_expert(alone, second, Y))
    figure = plots.class_by_expert(model, X, Y, layer="moe (call 2)", batch_size=4)
    np.testing.assert_allclose(matrix(figure), expected)
    page = keras_moe.report(model, (X, Y), tmp_path / "page.html").read_text(encoding="utf-8")
    assert page.count("<figcaption>Which classes use which expert.") == 2


def test_tokens_that_are_no_examples_any_more(tmp_path):
    flat = keras.layers.Lambda(lambda x: ops.reshape(x, (-1, D)), output_shape=(D,))
    model = model_of(flat, sparse())
    message = r"`layer` must name one whose inputs have the 10 examples .* layer='moe', length=40"
    with pytest.raises(ValueError, match=message):
        plots.class_by_expert(model, X, Y)
    with pytest.raises(ValueError, match=message):
        plots.patch_experts(model, X, pictures=np.zeros((10, 4, 4)))
    assert np.nanmean(matrix(plots.expert_load(model, X))) == pytest.approx(1.0)
    texts = [list("wxyz")] * 10
    path = keras_moe.report(model, (X, Y), tmp_path / "page.html", texts=texts)
    page = path.read_text(encoding="utf-8")
    assert "Experts that get the same tokens." in page  # and what does not need the examples only
    assert "Which classes use which expert." not in page and "The first text" not in page


def test_pictures_of_a_model_of_several_inputs_must_be_given():
    with pytest.raises(ValueError, match="`pictures` must be given where the model's inputs are"):
        plots.patch_experts(model_of(sparse()), {"x": X})


def test_layers_that_are_not_of_the_kind_are_named():
    message = r"`model` must have an `MMoE`, .* Received: model='mine', mixtures=\['moe'\]"
    model = model_of(sparse())
    model.name = "mine"
    with pytest.raises(ValueError, match=message):
        plots.task_gates(model, X)
