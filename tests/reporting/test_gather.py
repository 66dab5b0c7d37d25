"""Examples, labels and texts are read from all that `fit` takes."""

import keras
import numpy as np
import pytest

from keras_moe.reporting.gather import gather
from keras_moe.reporting.labels import labels_of
from keras_moe.reporting.top_tokens import texts_of, top_tokens

pytestmark = pytest.mark.one_backend("a page is of NumPy arrays")

X = np.arange(20, dtype="float32").reshape(10, 2)
Y = np.arange(10)


class Batches(keras.utils.PyDataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return X[3 * index : 3 * index + 3], Y[3 * index : 3 * index + 3]


def generator():
    while True:
        yield X[:4], Y[:4]


@pytest.mark.parametrize("data", [(X, Y), (X, Y, np.ones(10)), Batches(), iter([[X, Y]])])
def test_inputs_and_targets(data):
    x, y = gather(data, 7)
    np.testing.assert_array_equal(x, X[:7])
    np.testing.assert_array_equal(y, Y[:7])


def test_inputs_alone_structures_and_endless_data():
    x, y = gather(X, 100)
    assert x.shape == (10, 2) and y is None
    x, y = gather({"a": X, "b": Y}, 4)
    assert x["a"].shape == (4, 2) and x["b"].shape == (4,) and y is None
    x, y = gather([X, Y], 4)
    assert x[0].shape == (4, 2) and x[1].shape == (4,)
    x, y = gather(generator(), 6)
    np.testing.assert_array_equal(y, [0, 1, 2, 3, 0, 1])
    x, y = gather(({"a": X}, {"t": Y}), 3)
    assert x["a"].shape == (3, 2) and y["t"].shape == (3,)
    x, _ = gather(keras.ops.convert_to_tensor(X), 4)
    np.testing.assert_array_equal(x, X[:4])
    with pytest.raises(ValueError, match=r"give batches of them. Received: data='int'"):
        gather(3, 4)


def test_tf_data():
    if keras.backend.backend() != "tensorflow":
        pytest.skip("TensorFlow is imported on TensorFlow only")
    import tensorflow as tf

    x, y = gather(tf.data.Dataset.from_tensor_slices((X, Y)).batch(3), 7)
    np.testing.assert_array_equal(x, X[:7])
    np.testing.assert_array_equal(y, Y[:7])


def test_labels():
    assert labels_of(None, None, 3, None) is None
    assert labels_of(None, np.ones((3, 2)), 3, None) is None
    codes, names = labels_of(None, np.array([[2], [0], [2]]), 3, ["a", "b", "c"])
    assert names == ["a", "c"] and codes.tolist() == [1, 0, 1]
    codes, names = labels_of(["u", "v", "u", "w"], None, 3, None)
    assert names == ["u", "v"] and codes.tolist() == [0, 1, 0]
    many = [*range(50), *range(45, 50)]
    codes, names = labels_of(many, None, 55, None)
    assert len(names) == 40 and names[-5:] == ["45", "46", "47", "48", "49"]
    assert (codes == 40).sum() == 10  # the rare ones


def test_texts_of_ids():
    ids = np.array([[1, 0], [7, 1]])
    assert texts_of(ids, None, None) is None
    expected = [["b", "a"], ["[7]", "b"]]
    assert texts_of(ids, None, ["a", "b"]) == expected
    assert texts_of({"mask": np.ones((2, 2)), "ids": ids}, None, {0: "a", 1: "b"}) == expected


def test_top_tokens_are_the_typical_ones():
    texts = [["a", "b", "a"], ["b", "c"]]
    weights = np.zeros((2, 3, 2))
    weights[0] = [[1, 0], [0.5, 0.5], [1, 0]]
    weights[1] = [[0.5, 0.5], [0, 1], [0, 0]]
    first, second = top_tokens(weights, texts)
    # p(t|0) = (2, 1, 0)/3 and p(t|1) = (0, 1, 1)/2 of a, b, c; p(t) = (2, 2, 1)/5.
    assert [(token.text, token.share) for token in first] == [("a", 1.0)]
    assert [(token.text, token.share) for token in second] == [("c", 1.0), ("b", 0.5)]
    assert top_tokens(weights[:, 0], texts) is None
    assert top_tokens(weights, [["a"] * 4]) is None
