"""What may be changed on a layer that exists, and that the rest says no."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import layers, routers
from tests import helpers
from tests.contract import D, tokens

CAN_DO_WITH_FEWER = {
    "top_k": lambda k: layers.MoE(4, 8, top_k=k, seed=1),
    "object": lambda k: layers.MoE(4, 8, router=routers.TopKRouter(4, k, seed=1), seed=1),
    "not normalised": lambda k: layers.MoE(
        4, 8, router=routers.TopKRouter(4, k, normalize=False, seed=1), seed=1
    ),
    "sigmoid_bias": lambda k: layers.MoE(4, 8, top_k=k, router="sigmoid_bias", seed=1),
    "noisy_top_k": lambda k: layers.MoE(4, 8, top_k=k, router="noisy_top_k", seed=1),
    "batch_priority": lambda k: layers.MoE(
        4, 8, top_k=k, router="batch_priority", capacity_factor=2.0, seed=1
    ),
    "no_token_left": lambda k: layers.MoE(
        4, 8, top_k=k, router="no_token_left", capacity_factor=2.0, seed=1
    ),
    "sinkhorn": lambda k: layers.MoE(4, 8, top_k=k, router="sinkhorn", seed=1),
    "hash": lambda k: layers.MoE(4, 8, top_k=k, router="hash", seed=1),
    "random": lambda k: layers.MoE(4, 8, top_k=k, router="random", seed=1),
}


def built(make, k):
    layer = make(k)
    layer.build((None, None, D))
    return layer


@pytest.mark.parametrize("name", CAN_DO_WITH_FEWER)
def test_fewer_experts_are_what_a_layer_made_with_fewer_gives(name):
    make, x = CAN_DO_WITH_FEWER[name], tokens()
    layer, smaller = built(make, 3), built(make, 2)
    smaller.set_weights(layer.get_weights())

    def call(layer):  # compiled anew on JAX, where a program has the number of before
        return helpers.call(layer, x, return_routing=True)[0]

    assert call(layer)[1].experts.shape[-1] == 3
    layer.top_k = 2
    outputs, routing = call(layer)
    expected, expected_routing = call(smaller)
    np.testing.assert_array_equal(routing.experts, expected_routing.experts)
    np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-6)
    layer.top_k = 3  # and back
    assert call(layer)[1].experts.shape[-1] == 3


def test_one_expert_of_a_normalised_router_has_the_whole_weight():
    layer = built(CAN_DO_WITH_FEWER["top_k"], 2)
    layer.top_k = 1
    weights = helpers.call(layer, tokens(), return_routing=True)[0][1].weights
    np.testing.assert_allclose(weights, 1.0)


def test_compiling_again_takes_the_new_number_and_a_file_has_the_old_one(tmp_path):
    inputs = keras.Input((5, D))
    model = keras.Model(inputs, built(CAN_DO_WITH_FEWER["top_k"], 3)(inputs))
    layer, x = model.layers[-1], tokens()
    model.compile("sgd", "mse")
    before = model.predict(x, verbose=0)
    layer.top_k = 1
    np.testing.assert_allclose(
        before, model.predict(x, verbose=0) if is_compiled() else before, rtol=1e-5
    )
    model.compile("sgd", "mse")
    after = model.predict(x, verbose=0)
    assert np.abs(after - before).max() > 1e-3
    np.testing.assert_allclose(after, ops.convert_to_numpy(model(x)), rtol=1e-4, atol=1e-6)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    assert loaded.layers[-1].top_k == 3
    np.testing.assert_allclose(loaded.predict(x, verbose=0), before, rtol=1e-4, atol=1e-6)
    loaded.layers[-1].top_k = 1
    loaded.compile("sgd", "mse")
    np.testing.assert_allclose(loaded.predict(x, verbose=0), after, rtol=1e-4, atol=1e-6)


def is_compiled():
    return keras.backend.backend() != "torch"


@pytest.mark.parametrize(
    "router", ["switch", "dense", "uniform", "expert_choice", "relu", "dselect_k"]
)
@pytest.mark.one_backend("a check of arguments")
def test_what_fixes_its_experts_says_so(router):
    layer = layers.MoE(4, 8, router=router)
    with pytest.raises((AttributeError, ValueError), match="`top_k`"):
        layer.top_k = 2


@pytest.mark.one_backend("a check of arguments")
@pytest.mark.parametrize("k", [0, 4, 1.5])
def test_more_experts_than_it_was_made_with_are_refused(k):
    layer = layers.MoE(4, 8, top_k=3)
    with pytest.raises(ValueError, match="`top_k` must be an integer between 1 and"):
        layer.top_k = k


class Schedule(keras.callbacks.Callback):
    """Sets the coefficient of the balance loss, epoch by epoch."""

    def __init__(self, weights):
        super().__init__()
        self.weights = weights

    def on_epoch_begin(self, epoch, logs=None):
        self.model.layers[-1].balance_weight = self.weights[epoch]


def test_a_callback_schedules_the_balance_loss():
    inputs = keras.Input((5, D))
    model = keras.Model(inputs, layers.MoE(4, 8, balance_weight=1.0, z_loss_weight=0.0)(inputs))
    zero = keras.losses.MeanSquaredError()
    model.compile(keras.optimizers.SGD(0.0), lambda y, p: 0.0 * zero(y, p))
    x = tokens(8)
    history = model.fit(
        x, x, epochs=4, batch_size=8, verbose=0, callbacks=[Schedule([1.0, 0.5, 0.0, 2.0])]
    )
    losses = np.array(history.history["loss"])
    assert losses[0] > 0.9
    np.testing.assert_allclose(losses / losses[0], [1.0, 0.5, 0.0, 2.0], rtol=1e-5)
    assert model.layers[-1].balance_weight == 2.0


def test_a_loaded_layer_has_the_coefficients_it_is_made_with(tmp_path):
    def model_of(weight):
        return keras.Sequential([keras.Input((D,)), layers.MoE(4, 8, balance_weight=weight)])

    one, other = model_of(0.5), model_of(0.25)
    one.layers[0].balance_weight = 0.125
    one.save_weights(tmp_path / "one.weights.h5")
    other.load_weights(tmp_path / "one.weights.h5")
    assert (one.layers[0].balance_weight, other.layers[0].balance_weight) == (0.125, 0.25)
    for mine, its in zip(one.trainable_weights, other.trainable_weights, strict=True):
        np.testing.assert_array_equal(ops.convert_to_numpy(mine), ops.convert_to_numpy(its))


@pytest.mark.one_backend("no tensors")
def test_coefficients_keep_their_losses_whatever_the_router_is_told_later():
    layer = built(lambda k: layers.MoE(4, 8, balance_weight=0.5, z_loss_weight=0.25), None)
    layer.router.loss_weights["balance"] = 0.0
    layer(tokens(), training=True)
    assert len(layer.losses) == 2
    assert (layer.balance_weight, layer.z_loss_weight) == (0.5, 0.25)


@pytest.mark.one_backend("a check of arguments")
def test_a_loss_that_is_off_cannot_be_turned_on():
    layer = built(lambda k: layers.MoE(4, 8, z_loss_weight=0.0), None)
    with pytest.raises(ValueError, match="must have a coefficient above 0 when the layer is made"):
        layer.z_loss_weight = 0.1
    with pytest.raises(ValueError, match="`weight` must be a number of at least 0"):
        layer.balance_weight = -1.0
    with pytest.raises(ValueError, match="must be built before"):
        layers.MoE(4, 8).balance_weight = 0.1


FIXED = {
    "MoE": (
        lambda: layers.MoE(4, 8, num_shared_experts=1),
        {
            "num_experts": 8,
            "capacity_factor": 1.0,
            "dropout": 0.1,
            "router": routers.TopKRouter(4),
            "experts": layers.ExpertMLP(4, 8),
            "shared_experts": None,
        },
    ),
    "MMoE": (lambda: layers.MMoE(4, 8, 2), {"tasks": 3, "gate_dropout": 0.1}),
    "SoftMoE": (lambda: layers.SoftMoE(4, 8), {"slots_per_expert": 2}),
    "SwitchFFN": (lambda: layers.SwitchFFN(4, 8), {"jitter": 0.0, "activation": "gelu"}),
    "ExpertMLP": (lambda: layers.ExpertMLP(4, 8), {"gated": True}),
    "TopKRouter": (lambda: routers.TopKRouter(4), {"jitter": 0.1, "normalize": False}),
    "SoftmaxGate": (lambda: routers.SoftmaxGate(4, 2), {"num_tasks": 3}),
}


@pytest.mark.one_backend("no tensors")
@pytest.mark.parametrize(
    ("name", "argument"), [(name, each) for name, (_, more) in FIXED.items() for each in more]
)
def test_other_arguments_are_fixed(name, argument):
    make, values = FIXED[name]
    layer = make()
    with pytest.raises(AttributeError, match=f"`{argument}`.*is fixed when the layer is made"):
        setattr(layer, argument, values[argument])
