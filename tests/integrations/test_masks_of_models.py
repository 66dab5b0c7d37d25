"""Padding and masks of the ready-made models, seen from Keras 2."""

import numpy as np
import pytest
import tensorflow as tf
import tf_keras

from keras_moe import models
from keras_moe.integrations.tfrs import KerasBridge
from tests.helpers import randomize_weights

BATCH = 8


def tokens():
    """Ids, and 0 for padding on the right."""
    ids = np.random.default_rng(0).integers(1, 7, size=(BATCH, 3))
    return np.pad(ids, ((0, 0), (0, 2))).astype("int32")


@pytest.mark.parametrize("functional_model", [False, True])
def test_padding_of_a_decoder_enters_no_loss_of_keras_2(functional_model):
    arguments = {"num_experts": 4, "balance_weight": 0.0, "z_loss_weight": 0.0}
    inner = models.decoder(
        7,
        width=6,
        depth=1,
        num_heads=2,
        padding_id=0,
        feed_forward="moe",
        feed_forward_arguments=arguments,
    )
    randomize_weights(inner)
    bridge, ids = KerasBridge(inner), tokens()[:, ::-1]
    model = tf_keras.Sequential([bridge])
    if functional_model:
        inputs = tf_keras.Input((None,), dtype="int32")
        model = tf_keras.Model(inputs, bridge(inputs))
    targets = (ids + 1) % 7
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
    expected = loss(targets, inner(ids)).numpy()
    model.compile("sgd", tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    found = model.evaluate(ids, targets, batch_size=BATCH, verbose=0)
    assert found == pytest.approx(expected[ids != 0].mean(), rel=1e-5)
    assert abs(found - expected.mean()) > 1e-2
    model.fit(ids, targets, batch_size=BATCH, verbose=0)
    assert inner.get_layer("block_0_moe").running_counts()["decisions"] == (ids != 0).sum()


def test_a_mask_of_keras_2_reaches_a_decoder():
    arguments = {"width": 6, "depth": 1, "num_heads": 2}
    inner = models.decoder(7, **arguments)
    randomize_weights(inner)
    bridge, ids = KerasBridge(inner), tf.constant(tokens()[:, ::-1])
    mask = ids != 0
    expected = inner(ids, mask=mask)
    assert np.abs(expected - inner(ids)).max() > 1e-3
    implicit = tf.identity(ids)
    implicit._keras_mask = mask
    inputs = [tf_keras.Input((None,), dtype=dtype) for dtype in ("int32", "bool")]
    model = tf_keras.Model(inputs, bridge(inputs[0], mask=inputs[1]))
    for outputs in (bridge(ids, mask=mask), bridge(implicit), model([ids, mask])):
        np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
        np.testing.assert_array_equal(outputs._keras_mask, mask)


def test_a_mask_of_a_history_reaches_a_ranker():
    described = [
        models.features.Categorical("movie", 9),
        models.features.History("recent", 5, of="movie"),
    ]
    inner = models.multitask_ranker(described, {"stars": "regression"})
    randomize_weights(inner)
    recent, mask = tf.constant(tokens()), tf.constant([[True, False, True, False, True]] * BATCH)
    inputs = {"movie": tf.ones((BATCH,), "int32"), "recent": recent}
    outputs = KerasBridge(inner)(inputs, mask={"movie": None, "recent": mask})
    shorter = inner({**inputs, "recent": tf.where(mask, recent, 0)})
    np.testing.assert_allclose(outputs["stars"], shorter["stars"], rtol=1e-5, atol=1e-6)
    assert np.abs(outputs["stars"] - inner(inputs)["stars"]).max() > 1e-3
