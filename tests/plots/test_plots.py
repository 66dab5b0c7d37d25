"""Pictures show the numbers they should."""

import json

import keras
import numpy as np
import pytest

from keras_moe import callbacks, layers, plots

pytestmark = pytest.mark.one_backend("pictures are of NumPy arrays")

X = np.random.default_rng(0).normal(size=(40, 6)).astype("float32")


def model_of(*mixtures):
    inputs = outputs = keras.Input((6,))
    for mixture in mixtures:
        outputs = keras.tree.flatten(mixture(outputs))[0]
    return keras.Model(inputs, outputs)


def sorted_by(layer, experts):
    """Makes the router send tokens by their first feature's sign, to two experts."""
    kernel = np.zeros(layer.router.kernel.shape, "float32")
    kernel[0, experts[0]], kernel[0, experts[1]] = 5.0, -5.0
    layer.router.kernel.assign(kernel)


def matrix(figure, panel=0):
    """The numbers of a heat map."""
    return np.ma.filled(figure.axes[panel].images[0].get_array().astype(float), np.nan)


def looks_right(figure, path):
    figure.savefig(path)
    assert path.stat().st_size > 4000


def test_expert_load(tmp_path):
    first, second = layers.MoE(4, 8, top_k=1, name="one"), layers.MoE(3, 8, name="two")
    model = model_of(first, second)
    sorted_by(first, (1, 3))
    figure = plots.expert_load(model, X, batch_size=16)
    positive = (X[:, 0] > 0).mean()
    np.testing.assert_allclose(matrix(figure)[0], [0, 4 * positive, 0, 4 * (1 - positive)])
    assert np.isnan(matrix(figure)[1, 3]) and matrix(figure)[1, :3].mean() == pytest.approx(1.0)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["one", "two"]
    looks_right(figure, tmp_path / "load.png")


def test_class_by_expert(tmp_path):
    layer = layers.MoE(4, 8, top_k=1)
    model = model_of(layer)
    sorted_by(layer, (2, 0))
    labels = (X[:, 0] > 0).astype(int)
    figure = plots.class_by_expert(model, X, labels, class_names=["below", "above"])
    np.testing.assert_allclose(matrix(figure), [[1, 0, 0, 0], [0, 0, 1, 0]])
    looks_right(figure, tmp_path / "classes.png")
    with pytest.raises(ValueError, match="one integer class for each of 40 examples"):
        plots.class_by_expert(model, X, labels[:-1])
    with pytest.raises(ValueError, match=r"`layer` must name .* Received: layer='other'"):
        plots.class_by_expert(model, X, labels, layer="other")


def test_coactivation(tmp_path):
    layer = layers.MoE(4, 8, top_k=2)
    model = model_of(layer)
    kernel = np.zeros((6, 4), "float32")
    kernel[0] = [5.0, 4.0, -5.0, -4.0]
    layer.router.kernel.assign(kernel)
    values = matrix(plots.coactivation(model, X))
    assert np.isnan(np.diag(values)).all()
    np.testing.assert_allclose(values[[0, 1, 2, 3], [1, 0, 3, 2]], 1.0)
    np.testing.assert_allclose(values[[0, 1, 2, 3], [2, 3, 0, 1]], 0.0)
    looks_right(plots.coactivation(model, X), tmp_path / "pairs.png")


def test_slot_similarity(tmp_path):
    layer = layers.SoftMoE(2, 8, slots_per_expert=2)
    model = model_of(layer)
    phi = np.zeros((6, 2, 2), "float32")
    phi[0, 0], phi[1, 1, 0], phi[:2, 1, 1] = [1.0, -3.0], 2.0, 1.0
    layer.router.phi.assign(phi)
    values = matrix(plots.slot_similarity(model))
    np.testing.assert_allclose(values[0, 1:], [1.0, 0.0, 0.5**0.5], rtol=1e-6)
    looks_right(plots.slot_similarity(model), tmp_path / "slots.png")


def test_task_gates(tmp_path):
    layer = layers.MMoE(3, [6], ["click", "like"])
    model = model_of(layer)
    layer.gates.kernel.assign(np.zeros((2, 6, 3), "float32"))
    figure = plots.task_gates(model, X)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    np.testing.assert_allclose(heights, 1 / 3, rtol=1e-6)
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert {"click", "like", "equal"} == set(labels)
    looks_right(figure, tmp_path / "gates.png")


def test_load_over_time(tmp_path):
    path = tmp_path / "experts.jsonl"
    model = model_of(layers.MoE(4, 8, name="moe"), layers.MMoE(3, [6], 2, name="tasks"))
    model.compile("sgd", "mse")
    monitor = callbacks.ExpertMonitor(json=path, alarms=False)
    model.fit(X, X, epochs=3, verbose=0, callbacks=[monitor])
    figure = plots.load_over_time(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    load = np.array([line["counts"]["moe"]["load"] for line in lines])
    np.testing.assert_allclose(matrix(figure), load.T / load.mean(axis=1))
    assert matrix(figure, 1).shape == (3, 3)
    looks_right(figure, tmp_path / "time.png")
    (tmp_path / "empty").write_text("")
    with pytest.raises(ValueError, match="at least one epoch"):
        plots.load_over_time(tmp_path / "empty")


def test_which_layer_must_be_said_where_there_are_several():
    model = model_of(layers.MoE(4, 8, name="a"), layers.MoE(4, 8, name="b"))
    with pytest.raises(ValueError, match=r"one of \['a', 'b'\]. Received: layer=None"):
        plots.coactivation(model, X)
    assert plots.coactivation(model, X, layer="b").axes[0].get_title() == "Together: b"
    with pytest.raises(ValueError, match="must have a layer that sends tokens"):
        plots.expert_load(model_of(layers.SoftMoE(2, 8)), X)
