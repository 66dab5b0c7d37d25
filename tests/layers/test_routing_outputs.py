"""Routing decisions as outputs of a model, in `predict` and in a loaded model."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import layers
from tests.contract import D, tokens

MIXTURES = {
    "by token": (lambda: layers.MoE(4, 8), lambda record: record.by_token()),
    "by example": (
        lambda: layers.MoE(4, 8, routing_level="example"),
        lambda record: record.by_token(),
    ),
    "soft": (lambda: layers.SoftMoE(4, 8), lambda record: record._asdict()),
    "gates": (lambda: layers.MMoE(4, 8, tasks=2), lambda record: record._asdict()),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_predict_joins_them_and_a_loaded_model_has_them(name, tmp_path):
    make, fields = MIXTURES[name]
    inputs = keras.Input((5, D))
    outputs, record = make()(inputs, return_routing=True)
    model = keras.Model(inputs, {"first": keras.tree.flatten(outputs)[0], **fields(record)})
    x = tokens(7)
    expected = {key: ops.convert_to_numpy(value) for key, value in model(x).items()}
    assert all(len(value) == 7 for value in expected.values())

    model.save(tmp_path / "model.keras")
    for each in (model, keras.models.load_model(tmp_path / "model.keras")):
        found = each.predict(x, batch_size=3, verbose=0)
        assert set(found) == set(expected)
        for key, value in expected.items():
            np.testing.assert_allclose(found[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
