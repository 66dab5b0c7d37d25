"""`task_gates` follows its model, is saved with it, and says which layer it cannot read."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_moe
from keras_moe import layers
from keras_moe.models import task_gates

X = np.random.default_rng(0).normal(size=(10, 6)).astype("float32")


def mmoe(name="mmoe"):
    return layers.MMoE(3, [6], ["a", "b"], activation="tanh", name=name)


def model_of(*mixtures):
    inputs = outputs = keras.Input((6,))
    for mixture in mixtures:
        mixed = mixture(outputs)
        outputs = mixed["a"] + mixed["b"]
    return keras.Model(inputs, keras.layers.Dense(1)(outputs), name="mine")


def alone(mixture):
    inputs = keras.Input((6,))
    return keras.Model(inputs, mixture(inputs))


@keras.saving.register_keras_serializable("task_gates")
class Own(keras.Model):
    """A user's own model, which does without its mixture where it is told to."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.mmoe, self.head, self.is_used = mmoe(), keras.layers.Dense(1), True

    def call(self, x):
        return self.head(self.mmoe(x)["a"] if self.is_used else x)


def unknown_loss(y, predictions):
    """Is known where a model is trained, not where its gates are looked at."""
    return ops.mean(ops.square(y - predictions))


def gates_by_hand(layer, x=X):
    return ops.convert_to_numpy(layer(x, return_routing=True)[1].weights)


def predict(model, x=X):
    return model.predict(x, batch_size=4, verbose=0)  # 4, 4 and 2


def test_it_follows_training_from_before_and_from_within():
    layer = mmoe()
    model = model_of(layer)
    gates, seen = task_gates(model), []

    class Look(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            seen.append(predict(gates))

    before = predict(gates)
    np.testing.assert_allclose(before, gates_by_hand(layer), rtol=1e-5)
    model.compile(keras.optimizers.SGD(0.5), "mse")
    model.fit(X, np.ones((10, 1)), batch_size=5, epochs=2, verbose=0, callbacks=[Look()])
    after = predict(gates)
    assert np.abs(after - before).max() > 1e-3 and np.abs(seen[0] - after).max() > 1e-4
    np.testing.assert_allclose(seen[1], after, rtol=1e-5)
    np.testing.assert_allclose(after, gates_by_hand(layer), rtol=1e-5)
    np.testing.assert_allclose(gates.predict_on_batch(X[:4]), after[:4], rtol=1e-5)
    np.testing.assert_allclose(after.sum(axis=-1), 1.0, rtol=1e-5)
    assert gates.name == "mine_gates" and after.dtype == "float32"
    assert {id(each) for each in gates.weights} == {id(each) for each in model.weights}


@pytest.mark.parametrize("make", [lambda: model_of(mmoe()), Own])
def test_it_is_saved_with_its_model(make, tmp_path):
    model = make()
    model(X)
    model.compile("sgd", unknown_loss)
    gates = task_gates(model)
    gates.save(tmp_path / "gates.keras")
    loaded = keras.saving.load_model(tmp_path / "gates.keras")
    np.testing.assert_allclose(predict(loaded), predict(gates), rtol=1e-6)
    for variable in model.trainable_variables:
        variable.assign(0.0 * variable)
    assert np.ptp(predict(gates)) < 1e-6 < np.ptp(predict(loaded))  # on its own


def test_it_is_a_layer_of_other_models_and_reads_what_others_read():
    layer = mmoe()
    gates = task_gates(model_of(layer))
    inputs = keras.Input((6,))
    outer = keras.Model(inputs, ops.max(gates(inputs), axis=-1))
    assert outer.output_shape == (None, 2)
    np.testing.assert_allclose(predict(outer), gates_by_hand(layer).max(axis=-1), rtol=1e-5)
    with keras_moe.record_routing(outer) as records:
        gates(X)
        outer(X)
    assert len(records["mmoe"]) == 2


def test_data_of_other_types():
    layer = mmoe()
    gates = task_gates(model_of(layer))
    expected = gates_by_hand(layer)
    np.testing.assert_allclose(predict(gates, X.astype("float64")), expected, rtol=1e-4)
    pixels = (10 * np.abs(X)).astype("uint8")
    expected = gates_by_hand(layer, pixels.astype("float32"))
    np.testing.assert_allclose(predict(gates, pixels), expected, rtol=1e-4)


def test_one_of_several():
    several = mmoe(), mmoe(), mmoe("other")
    model = model_of(*map(alone, several))  # Keras has equal names in models of their own only
    message = r"`layer` must name an `MMoE`: one of \['mmoe', 'mmoe#2', 'other'\]. .* layer=None"
    with pytest.raises(ValueError, match=message):
        task_gates(model)
    with pytest.raises(ValueError, match=r"one of .* Received: layer='moe'"):
        task_gates(model, "moe")
    x = ops.convert_to_numpy(sum(several[0](X).values()))
    expected = gates_by_hand(several[1], x)
    np.testing.assert_allclose(predict(task_gates(model, layer="mmoe#2")), expected, rtol=1e-5)


def test_a_list_where_the_layer_is_called_several_times():
    layer = mmoe()
    model = model_of(layer, layer)
    first, second = predict(task_gates(model))
    np.testing.assert_allclose(first, gates_by_hand(layer), rtol=1e-5)
    x = ops.convert_to_numpy(sum(layer(X).values()))
    np.testing.assert_allclose(second, gates_by_hand(layer, x), rtol=1e-5)


def test_a_layer_that_is_not_called():
    model = Own()
    model(X)
    gates, model.is_used = task_gates(model), False
    with pytest.raises(ValueError, match=r"`model` must call its `MMoE`. .* layer='mmoe'"):
        gates(X)
