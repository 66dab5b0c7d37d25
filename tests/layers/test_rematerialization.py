"""`keras.RematScope` recomputes experts, routes once, counts once and adds each loss once."""

import keras
import numpy as np
import pytest

from keras_moe import layers, routers
from tests import helpers

D = 6
LAYERS = {
    "moe": lambda **kw: layers.MoE(4, 8, router="switch", seed=3, **kw),
    "capacity": lambda **kw: layers.MoE(4, 8, capacity_factor=0.75, **kw),
    "shared": lambda **kw: layers.MoE(4, 8, num_shared_experts=1, experts="glu", **kw),
    "switch": lambda **kw: layers.SwitchFFN(4, 8, jitter=0.5, seed=3, **kw),
    "soft": lambda **kw: layers.SoftMoE(4, 8, **kw),
    "mmoe": lambda **kw: layers.MMoE(4, [8], 1, **kw),
    "dropout": lambda **kw: layers.MoE(4, 8, dropout=0.5, seed=3, **kw),
}


def trained(make, remat):
    """One epoch of `fit`; returns the losses, the weights, the counts."""
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
    weights = [keras.ops.convert_to_numpy(v) for v in layer.trainable_variables]
    return history.history["loss"], weights, layer.running_counts(), layer


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS.keys())
def test_changes_nothing_but_memory(make):
    losses, weights, counts, _ = trained(make, remat=False)
    again_losses, again_weights, again_counts, layer = trained(make, remat=True)
    assert layer._recomputes_experts == (not layer.dropout)
    np.testing.assert_allclose(again_losses, losses, rtol=1e-5)
    helpers.assert_all_close(dict(enumerate(again_weights)), dict(enumerate(weights)))
    for name, value in counts.items():
        np.testing.assert_allclose(again_counts[name], value, rtol=1e-5)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ({"mode": "full"}, 1),
        ({"mode": "activations"}, 1),
        ({"mode": "larger_than", "output_size_threshold": 10}, 1),
        ({"mode": "larger_than", "output_size_threshold": 10_000}, 0),
        ({"mode": "list_of_layers", "layer_names": ["mixture"]}, 1),
        ({"mode": "list_of_layers", "layer_names": ["other"]}, 0),
    ],
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


def test_dropout_is_not_drawn_again(monkeypatch):
    monkeypatch.setattr(keras, "remat", None)
    with keras.RematScope(mode="full"):
        layer = layers.MoE(4, 8, dropout=0.5)
    outputs = layer(keras.ops.ones((3, D)), training=True)  # calling None would fail
    assert not layer._recomputes_experts and tuple(outputs.shape) == (3, D)
