"""Layers stand in the order in which data meets them."""

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe import layers, plots
from keras_moe.inspection.mixtures import named_layers

pytestmark = pytest.mark.one_backend("an order of Python objects")

X = np.zeros((2, 3, 6), "float32")
EXPECTED = ["z", "inner_b", "inner_a", "a"]


def mixture(name):
    return layers.MoE(2, 4, name=name)


def sequential():
    inner = keras.Sequential([mixture("inner_b"), mixture("inner_a")])
    model = keras.Sequential([mixture("z"), keras.layers.Dense(6), inner, mixture("a")])
    model(X)
    return model


def functional():
    inputs = keras.Input((3, 6))
    inner = keras.Model(inputs, mixture("inner_a")(mixture("inner_b")(inputs)))
    inputs, last = keras.Input((3, 6)), mixture("a")  # made before those that it follows
    return keras.Model(inputs, last(keras.layers.Dense(6)(inner(mixture("z")(inputs)))))


def functional_in_sequential():
    inputs = keras.Input((3, 6))
    inner = keras.Model(inputs, mixture("inner_a")(mixture("inner_b")(inputs)))
    return keras.Sequential([keras.Input((3, 6)), mixture("z"), inner, mixture("a")])


class Subclassed(keras.Model):
    def __init__(self):
        super().__init__()
        self.last = mixture("a")
        self.inner = [mixture("inner_a"), mixture("inner_b")]
        self.first = mixture("z")

    def call(self, inputs):
        inputs = self.first(inputs)
        for layer in reversed(self.inner):
            inputs = layer(inputs)
        return self.last(inputs)


@pytest.mark.parametrize("make", [sequential, functional, functional_in_sequential])
def test_models_that_know_their_layers(make, tmp_path):
    model = make()
    assert [name for name, _ in named_layers(model)] == EXPECTED
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [name for name, _ in named_layers(loaded)] == EXPECTED


def test_a_subclassed_model_says_when_it_is_called():
    model = Subclassed()
    model(X)
    with keras_moe.record_routing(model) as records:
        model(X)
    assert list(records) == EXPECTED
    assert [len(calls) for calls in records.values()] == [1] * 4
    figure = plots.expert_load(model, X)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == EXPECTED
    with keras_moe.record_routing(model) as records:
        model.inner[0](X)
    assert list(records) == ["a", "inner_b", "z", "inner_a"]  # behind those not called
