"""Contexts that watch a model see what it compiled before, and leave no trace in it."""

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe import layers
from keras_moe.inspection.recording import count_routing
from tests.helpers import some_everywhere

X = np.random.default_rng(0).normal(size=(8, 5, 6)).astype("float32")
Y = X[..., :1]
TOKENS = 40
COMPILED = keras.backend.backend() != "torch"  # which runs them eagerly, and can be read


def trained_model():
    """Every program of it compiled: `fit`, `evaluate` and `predict`; with a model inside."""
    inputs = keras.Input((5, 6))
    inner = keras.Sequential([inputs, layers.MoE(4, 8, name="moe")])
    outer = keras.Input((5, 6))
    model = keras.Model(outer, keras.layers.Dense(1)(inner(outer)))
    model.compile("sgd", "mse")
    model.fit(X, Y, batch_size=4, verbose=0)
    model.evaluate(X, Y, batch_size=4, verbose=0)
    model.predict(X, batch_size=4, verbose=0)
    return model


PROGRAMS = {
    "predict": lambda model: model.predict(X, batch_size=4, verbose=0),
    "predict_on_batch": lambda model: model.predict_on_batch(X[:4]),
    "evaluate": lambda model: model.evaluate(X, Y, batch_size=4, verbose=0),
    "test_on_batch": lambda model: model.test_on_batch(X[:4], Y[:4]),
    "fit": lambda model: model.fit(X, Y, batch_size=4, verbose=0),
    "train_on_batch": lambda model: model.train_on_batch(X[:4], Y[:4]),
}


@pytest.mark.parametrize(
    "program",
    some_everywhere(PROGRAMS, ["predict", "test_on_batch", "fit"], "Keras has one program for two"),
)
def test_recording_refuses_a_program_and_spares_the_model(program):
    model = trained_model()
    before = [keras.ops.convert_to_numpy(w) for w in model.weights]
    outputs = model.predict(X, verbose=0)
    if COMPILED:
        message = r"call `model\(x\)` inside of it, not `predict` or `fit`"
        with pytest.raises(ValueError, match=message), keras_moe.record_routing(model) as records:
            program(model)
    else:
        with keras_moe.record_routing(model) as records:
            program(model)
        assert records["moe"]
    for weight, value in zip(model.weights, before, strict=True):
        assert weight._value is not None
        keras.ops.copy(weight.value)  # a donated buffer cannot be read
        weight.assign(value)
    np.testing.assert_allclose(model.predict(X, verbose=0), outputs, rtol=1e-5, atol=1e-6)
    for again in PROGRAMS.values():
        again(model)
    with keras_moe.record_routing(model) as records:
        model(X)
    assert len(records["moe"]) == 1


def test_an_error_of_what_could_not_be_read_is_explained():
    if not COMPILED:
        pytest.skip("torch reads it")
    model = trained_model()
    message = "call `model"
    with pytest.raises(ValueError, match=message), keras_moe.record_routing(model) as records:
        model.predict(X, verbose=0)
        _ = records["moe"][0]
    with pytest.raises(KeyError), keras_moe.record_routing(model) as records:
        model(X)
        _ = records["none"]


@pytest.mark.parametrize("context", [keras_moe.record_routing, count_routing])
def test_a_context_without_a_call_says_so(context):
    """As where a function of one's own was compiled before, which nothing can change."""
    model = trained_model()
    with pytest.raises(ValueError, match=r"no call of a mixture|calls=0"), context(model):
        pass


@pytest.mark.parametrize(
    "name",
    some_everywhere(
        ["predict", "evaluate", "predict_on_batch", "test_on_batch"],
        ["predict", "test_on_batch"],
        "Keras has one program for two",
    ),
)
def test_counting_counts_in_programs_and_ends(name):
    model, program = trained_model(), PROGRAMS[name]
    moe = model.layers[1].get_layer("moe")
    before = moe.running_counts()
    tokens = TOKENS if "batch" not in name else TOKENS / 2
    for _ in range(2):
        with count_routing(model) as counts:
            program(model)
        assert counts["moe"]["decisions"] == tokens
        program(model)
        for key, value in moe.running_counts().items():
            np.testing.assert_array_equal(value, before[key])


def test_programs_are_those_of_before():
    """Nothing is compiled again after a context, and one inside of `fit` does no harm."""
    model = trained_model()
    before = model.train_function, model.test_function, model.predict_function
    seen = []

    def look(epoch, logs):
        with keras_moe.record_routing(model) as records, count_routing(model) as counts:
            seen.append(keras.ops.convert_to_numpy(model(X)))
        assert len(records["moe"]) == 1 and counts["moe"]["decisions"] == TOKENS

    callback = keras.callbacks.LambdaCallback(on_epoch_end=look, on_train_batch_end=look)
    model.fit(X, Y, batch_size=4, verbose=0, callbacks=[callback])
    assert before == (model.train_function, model.test_function, model.predict_function)
    assert len(seen) == 3
    np.testing.assert_allclose(seen[-1], model.predict(X, verbose=0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(seen[-1], seen[-2], rtol=1e-5, atol=1e-6)  # of the last batch
