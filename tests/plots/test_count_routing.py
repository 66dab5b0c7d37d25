"""Counting in inference says what training would, and leaves nothing behind."""

import keras
import numpy as np
import pytest

from keras_moe import layers
from keras_moe.inspection.recording import count_routing

pytestmark = pytest.mark.one_backend("pictures are of NumPy arrays")

X = np.random.default_rng(0).normal(size=(4, 5, 6)).astype("float32")
X[0, 3:] = 0.0  # padding


def test_counts_are_those_of_training_and_layers_keep_theirs():
    inputs = outputs = keras.Input((5, 6))
    outputs = keras.layers.Masking()(outputs)
    for mixture in (
        layers.MoE(4, 8, name="token", capacity_factor=1.0),
        layers.MoE(4, 8, name="example", routing_level="example"),
        layers.MoE(4, 8, name="choice", router="expert_choice"),
        layers.SoftMoE(3, 8, name="soft"),
        layers.MMoE(2, 6, 2, name="tasks"),
    ):
        outputs = keras.tree.flatten(mixture(outputs))[0]
    model = keras.Model(inputs, outputs)
    model(X, training=True)
    expected = {name: model.get_layer(name).running_counts() for name in ("token", "soft", "tasks")}
    for _ in range(2):  # the second time finds nothing of the first
        with count_routing(model) as counts:
            model(X)
        assert set(counts) == {"token", "example", "choice", "soft", "tasks"}
        for name, of_layer in expected.items():
            for key, value in of_layer.items():
                np.testing.assert_allclose(counts[name][key], value, rtol=1e-6, err_msg=name + key)
                kept = model.get_layer(name).running_counts()[key]
                np.testing.assert_array_equal(kept, value)
    assert counts["token"]["decisions"] == 18
    model(X)
    np.testing.assert_array_equal(
        model.get_layer("token").running_counts()["load"], expected["token"]["load"]
    )
