"""`keras.RematScope` recomputes experts, routes once, counts once and adds each loss once."""

import keras
import numpy as np
import pytest

from keras_moe import layers, routers
from tests import helpers
from tests.helpers import some_everywhere

D = 6


class Noisy(keras.layers.Layer):
    """An expert with what Keras layers have: noise, state that a call updates, a loss."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.hidden = keras.layers.Dense(8, "relu", activity_regularizer=keras.regularizers.L2(0.1))
        self.noise = keras.layers.GaussianNoise(0.3, seed=5)
        self.dropout = keras.layers.Dropout(0.5, seed=4)
        self.out = keras.layers.Dense(D)

    def build(self, input_shape):
        self.calls = self.add_weight(shape=(), initializer="zeros", trainable=False)

    def call(self, inputs, training=None):
        if training:
            self.calls.assign(self.calls + 1.0)
        return self.out(self.dropout(self.noise(self.hidden(inputs)))) * (1.0 + 0.1 * self.calls)


def noisy_bank(**arguments):
    bank = layers.ExpertMLP(4, (8, D), **{"dropout": 0.5, "seed": 3, **arguments})
    return {"experts": bank}


LAYERS = {
    "moe": lambda **kw: layers.MoE(4, 8, router="switch", seed=3, **kw),
    "capacity": lambda **kw: layers.MoE(4, 8, capacity_factor=0.75, **kw),
    "weighed inputs": lambda **kw: layers.MoE(4, 8, weigh="inputs", **kw),
    "shared": lambda **kw: layers.MoE(4, 8, num_shared_experts=1, experts="glu", **kw),
    "switch": lambda **kw: layers.SwitchFFN(4, 8, jitter=0.5, seed=3, **kw),
    "soft": lambda **kw: layers.SoftMoE(4, 8, **kw),
    "mmoe": lambda **kw: layers.MMoE(4, [8], 1, **kw),
    "dropout": lambda **kw: layers.MoE(4, 8, dropout=0.5, seed=3, **kw),
    "bank": lambda **kw: layers.MoE(4, **noisy_bank(), **kw),
    "bank_capacity": lambda **kw: layers.MoE(4, **noisy_bank(), capacity_factor=1.0, **kw),
    "bank_activation": lambda **kw: layers.MoE(
        4, **noisy_bank(dropout=0.0, activation=keras.layers.Dropout(0.5, seed=2)), **kw
    ),
    "soft_bank": lambda **kw: layers.SoftMoE(4, **noisy_bank(), **kw),
    "mmoe_dropout": lambda **kw: layers.MMoE(4, [8], 1, dropout=0.5, seed=3, **kw),
    "shared_dropout": lambda **kw: layers.MoE(
        4, 8, dropout=0.5, num_shared_experts=1, seed=3, **kw
    ),
    "keras": lambda **kw: layers.MoE(4, experts=[Noisy() for _ in range(4)], **kw),
    "keras_capacity": lambda **kw: layers.MoE(
        4, experts=[Noisy() for _ in range(4)], capacity_factor=1.0, **kw
    ),
    "sequential": lambda **kw: layers.MoE(
        4, experts=keras.Sequential([keras.layers.Dense(D), keras.layers.Dropout(0.5)]), **kw
    ),
    "keras_soft": lambda **kw: layers.SoftMoE(4, experts=[Noisy() for _ in range(4)], **kw),
    "nested": lambda **kw: layers.MoE(
        2, experts=layers.MoE(2, 4, dropout=0.5, seed=3), capacity_factor=2.0, seed=1, **kw
    ),
}


def trained(make, remat):
    """Two epochs of `fit`; returns the losses, the weights, the counts."""
    keras.utils.set_random_seed(0)
    if remat:
        with keras.RematScope(mode="full"):
            layer = make(name="mixture")
    else:
        layer = make(name="mixture")
    inputs = keras.Input((5, D))
    outputs = layer(inputs)
    outputs = outputs[0] if isinstance(outputs, list) else outputs
    model = keras.Model(inputs, keras.layers.Dense(1)(outputs))
    # Plain SGD shows a slope that is counted twice; Adam would hide it.
    model.compile(keras.optimizers.SGD(0.1), "mse")
    rng = np.random.default_rng(0)
    x = rng.normal(size=(16, 5, D)).astype("float32")
    history = model.fit(x, x[..., :1], batch_size=8, epochs=2, shuffle=False, verbose=0)
    weights = [keras.ops.convert_to_numpy(v).astype("float64") for v in layer.variables]
    return history.history["loss"], weights, layer.running_counts(), layer


# Every way to compute experts, every kind of noise, state and losses; not their combinations.
EVERYWHERE = ["moe", "switch", "bank_activation", "shared_dropout", "soft_bank", "mmoe_dropout"]
EVERYWHERE += ["keras", "nested"]


@pytest.mark.parametrize(
    "make", some_everywhere(LAYERS, EVERYWHERE, "the same calls in other combinations")
)
def test_changes_nothing_but_memory(make):
    losses, weights, counts, _ = trained(make, remat=False)
    again_losses, again_weights, again_counts, layer = trained(make, remat=True)
    assert layer._recomputes_experts
    np.testing.assert_allclose(again_losses, losses, rtol=1e-5)
    helpers.assert_all_close(dict(enumerate(again_weights)), dict(enumerate(weights)))
    for name, value in counts.items():
        np.testing.assert_allclose(again_counts[name], value, rtol=1e-5)


SCOPES = {
    "full": {"mode": "full"},
    "activations": {"mode": "activations"},
    "larger_than": {"mode": "larger_than", "output_size_threshold": 1},
    "list_of_layers": {"mode": "list_of_layers", "layer_names": ["mixture", "inner", "experts"]},
}


@pytest.mark.parametrize(
    "scope", some_everywhere(SCOPES, ["full"], "which layers a scope means is decided in Python")
)
@pytest.mark.parametrize("is_made_inside", [False, True])
@pytest.mark.parametrize("kind", [layers.MoE, layers.SoftMoE])
def test_a_layer_that_is_built_in_a_scope(kind, is_made_inside, scope):
    """Also experts that make layers while they are built, as a `Sequential` does."""

    def make():
        inner = [keras.layers.Dense(D, "relu"), keras.layers.Dropout(0.5)]
        return kind(4, experts=keras.Sequential(inner, name="inner"), name="mixture")

    layer = None if is_made_inside else make()
    with keras.RematScope(**scope):
        layer = layer or make()
        inputs = keras.Input((5, D))
        outputs = layer(inputs)
    model = keras.Model(inputs, outputs)
    model.compile("sgd", "mse")
    x = np.random.default_rng(0).normal(size=(8, 5, D)).astype("float32")
    assert np.isfinite(model.fit(x, x, verbose=0).history["loss"]).all()
    assert layer._recomputes_experts == is_made_inside


MODES = {
    "full": ({"mode": "full"}, 1),
    "activations": ({"mode": "activations"}, 1),
    "larger": ({"mode": "larger_than", "output_size_threshold": 10}, 1),
    "smaller": ({"mode": "larger_than", "output_size_threshold": 10_000}, 0),
    "named": ({"mode": "list_of_layers", "layer_names": ["mixture"]}, 1),
    "not_named": ({"mode": "list_of_layers", "layer_names": ["other"]}, 0),
}


@pytest.mark.parametrize(
    ("mode", "expected"),
    some_everywhere(MODES, ["full", "smaller"], "which layers a scope means is decided in Python"),
)
def test_only_experts_are_computed_again(monkeypatch, mode, expected):
    inside, called, remat = [], {"TopKRouter": [], "ExpertMLP": []}, keras.remat

    def noted(function):
        def run(*args):
            inside.append(True)
            try:
                return function(*args)
            finally:
                inside.pop()

        return remat(run)

    monkeypatch.setattr(keras, "remat", noted)
    for kind in (routers.TopKRouter, layers.ExpertMLP):

        def call(self, *args, kind=kind, call=kind.call, **kwargs):
            called[kind.__name__].append(len(inside))
            return call(self, *args, **kwargs)

        monkeypatch.setattr(kind, "call", call)
    with keras.RematScope(**mode):
        layer = layers.MoE(4, 8, name="mixture")
    layer(keras.ops.ones((3, D)), training=True)
    assert set(called["TopKRouter"]) == {0}
    assert set(called["ExpertMLP"]) == {expected}
