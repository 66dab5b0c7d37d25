"""Labels that are missing count for no task, and take nothing from the others."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import layers
from keras_moe.multitask import MaskedLoss, MaskedMetric

RNG = np.random.default_rng(0)
LABELS = (RNG.uniform(size=(12, 1)) > 0.5).astype("float32")
PREDICTED = RNG.uniform(0.1, 0.9, size=(12, 1)).astype("float32")
HAS = np.arange(12) % 3 > 0


def spoiled(missing=math.nan):
    return np.where(HAS[:, None], LABELS, missing).astype("float32")


def number(tensor):
    return float(ops.convert_to_numpy(tensor))


@pytest.mark.parametrize("missing", [math.nan, -1.0])
@pytest.mark.parametrize(
    "loss",
    ["mse", "binary_crossentropy", "huber", keras.losses.BinaryCrossentropy(label_smoothing=0.1)],
)
def test_a_loss_is_the_mean_of_what_has_a_label(loss, missing):
    made = keras.losses.get(loss)
    values = made.call if isinstance(made, keras.losses.Loss) else made
    expected = number(ops.mean(values(LABELS[HAS], PREDICTED[HAS])))
    masked = MaskedLoss(loss, missing=missing)
    assert number(masked(spoiled(missing), PREDICTED)) == pytest.approx(expected, rel=1e-5)
    again = MaskedLoss.from_config(masked.get_config())
    assert number(again(spoiled(missing), PREDICTED)) == pytest.approx(expected, rel=1e-5)
    flat = number(masked(spoiled(missing)[:, 0], PREDICTED))
    assert flat == pytest.approx(expected, rel=1e-5)


def test_sample_weights_multiply():
    weights = RNG.uniform(size=12).astype("float32")
    squares = ((LABELS - PREDICTED) ** 2)[:, 0]
    expected = (squares * weights)[HAS].sum() / HAS.sum()
    found = number(MaskedLoss("mse")(spoiled(), PREDICTED, sample_weight=weights))
    assert found == pytest.approx(expected, rel=1e-5)


def test_classes_and_vectors_of_labels():
    classes = np.array([2, -1, 0, 1], "int32")
    shares = np.full((4, 3), 1 / 3, "float32")
    loss = MaskedLoss("sparse_categorical_crossentropy", missing=-1)
    assert number(loss(classes, shares)) == pytest.approx(math.log(3), rel=1e-5)
    vectors = np.array([[1.0, np.nan], [2.0, 0.0]], "float32")  # the first one lacks a part
    found = number(MaskedLoss("mse")(vectors, np.zeros((2, 2), "float32")))
    assert found == pytest.approx(2.0)


def test_a_batch_without_labels_costs_nothing():
    nothing = np.full((5, 1), np.nan, "float32")
    assert number(MaskedLoss("binary_crossentropy")(nothing, PREDICTED[:5])) == 0.0


@pytest.mark.parametrize(
    "metric", ["mae", "binary_accuracy", keras.metrics.AUC(name="auc"), keras.metrics.Recall()]
)
def test_a_metric_sees_what_has_a_label(metric):
    masked = MaskedMetric(metric)
    plain = type(masked.metric).from_config(masked.metric.get_config())
    for _ in range(2):
        masked.update_state(spoiled(), PREDICTED)
        plain.update_state(LABELS[HAS], PREDICTED[HAS])
    assert number(masked.result()) == pytest.approx(number(plain.result()), rel=1e-5)
    masked.reset_state()
    masked.update_state(spoiled(), PREDICTED)
    again = MaskedMetric.from_config(masked.get_config())
    again.update_state(spoiled(), PREDICTED)
    assert again.name == masked.name
    assert number(again.result()) == pytest.approx(number(masked.result()), rel=1e-5)


def test_other_tasks_train_and_nothing_is_nan(tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((4,))
    mixed = layers.MMoE(3, [8], ["often", "rarely"])(inputs)
    outputs = {t: keras.layers.Dense(1, "sigmoid", name=t)(x) for t, x in mixed.items()}
    model = keras.Model(inputs, outputs)
    model.compile(
        keras.optimizers.Adam(0.03),
        {task: MaskedLoss("binary_crossentropy") for task in outputs},
        weighted_metrics={task: [MaskedMetric(keras.metrics.AUC(name="auc"))] for task in outputs},
    )
    x = RNG.normal(size=(96, 4)).astype("float32")
    labels = {
        "often": (x[:, :1] > 0).astype("float32"),
        "rarely": (x[:, 1:2] > 0).astype("float32"),
    }
    labels["rarely"][:64] = np.nan  # whole batches without any
    history = model.fit(x, labels, batch_size=32, epochs=8, verbose=0, shuffle=False).history
    assert all(np.isfinite(values).all() for values in history.values())
    assert history["loss"][-1] < 0.8 * history["loss"][0]
    assert history["often_auc"][-1] > 0.8
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    found, expected = (m.evaluate(x, labels, verbose=0, return_dict=True) for m in (loaded, model))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4)


def test_a_missing_label_gives_no_gradient():
    layer = keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")
    model = keras.Sequential([keras.Input((12,)), layer])
    model.compile(keras.optimizers.SGD(1.0), MaskedLoss("mse"))
    model.fit(np.eye(12, dtype="float32"), spoiled(), batch_size=12, epochs=1, verbose=0)
    moved = np.abs(ops.convert_to_numpy(layer.kernel)[:, 0] - 1.0) > 1e-6
    np.testing.assert_array_equal(moved, HAS & (LABELS[:, 0] != 1.0))


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: MaskedLoss(3), "Could not interpret|`loss` must be"),
        (lambda: MaskedMetric(3), "Could not interpret|`metric` must be"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()
