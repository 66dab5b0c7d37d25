"""`record_routing` reads what every layer decides, and leaves nothing behind."""

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe import layers
from keras_moe.inspection.recording import count_routing

pytestmark = pytest.mark.one_backend("pictures are of NumPy arrays")


def model_of(*mixtures):
    inputs = outputs = keras.Input((5, 6))
    for mixture in mixtures:
        outputs = keras.tree.flatten(mixture(outputs))[0]
    return keras.Model(inputs, outputs)


X = np.random.default_rng(0).normal(size=(4, 5, 6)).astype("float32")


def test_every_layer_is_recorded_as_it_returns_it():
    moe, soft, tasks = layers.MoE(4, 8, name="moe"), layers.SoftMoE(3, 8), layers.MMoE(2, 6, 2)
    model = model_of(moe, soft, tasks)
    with keras_moe.record_routing(model) as records:
        model(X)
        model(X[:2])
    assert set(records) == {"moe", soft.name, tasks.name}
    assert [len(calls) for calls in records.values()] == [2, 2, 2]
    _, expected = moe(X, return_routing=True)
    np.testing.assert_array_equal(records["moe"][0].experts, np.asarray(expected.experts))
    assert records["moe"][1].kept.shape == (2, 5, 2)
    assert records[soft.name][0].combine.shape == (4, 5, 3, 1)
    assert records[tasks.name][0].weights.shape == (4, 5, 2, 2)
    model(X)
    assert len(records["moe"]) == 2  # not any more


def test_equal_names_nested_models_and_example_level():
    inner = model_of(layers.MoE(4, 8, name="moe", routing_level="example"))
    outer = model_of(layers.MoE(3, 8, name="moe"), inner)
    with keras_moe.record_routing(outer) as records:
        outer(X)
    assert records["moe"][0].experts.shape == (4, 5, 2)
    assert records["moe#2"][0].experts.shape == (4, 2)


def test_a_layer_alone_can_be_recorded():
    layer = layers.MoE(4, 8, name="moe")
    layer.build(X.shape)
    with keras_moe.record_routing(layer) as records:
        layer(X)
    assert len(records["moe"]) == 1


def test_predict_says_what_to_do():
    model = model_of(layers.MoE(4, 8))
    if keras.backend.backend() == "torch":
        pytest.skip("torch runs `predict` eagerly")
    message = r"call `model\(x\)`, not `predict` or `fit`"
    with pytest.raises(ValueError, match=message), keras_moe.record_routing(model):
        model.predict(X, verbose=0)


def test_a_model_without_mixtures():
    message = "must have a mixture layer that is built"
    with pytest.raises(ValueError, match=message):
        keras_moe.record_routing(model_of(keras.layers.Dense(6))).__enter__()


def test_nested_layers_come_in_the_order_of_the_model():
    inner = model_of(layers.MoE(4, 8, name="a"), layers.MoE(4, 8, name="b"))
    outer = model_of(layers.MoE(3, 8, name="first"), inner, layers.MoE(3, 8, name="last"))
    with keras_moe.record_routing(outer) as records:
        outer(X)
    assert list(records) == ["first", "a", "b", "last"]
    twins = [model_of(layers.MoE(experts, 8, name="moe")) for experts in (3, 4)]
    twins = model_of(model_of(*twins))
    with keras_moe.record_routing(twins) as records:
        twins(X)
    assert [calls[0].logits.shape[-1] for calls in records.values()] == [3, 4]


def test_contexts_inside_of_each_other_see_their_calls():
    model = model_of(layers.MoE(4, 8, name="moe"))
    with keras_moe.record_routing(model) as outer, count_routing(model) as outer_counts:
        with keras_moe.record_routing(model) as inner, count_routing(model) as inner_counts:
            model(X)
        model(X)
    assert len(outer["moe"]) == 2 and len(inner["moe"]) == 1
    assert outer_counts["moe"]["decisions"] == 40 and inner_counts["moe"]["decisions"] == 20
    assert model.get_layer("moe").running_counts()["decisions"] == 0
