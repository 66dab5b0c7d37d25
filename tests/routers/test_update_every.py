"""What follows the load changes once per step of the optimizer, also where gradients are summed."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import callbacks, layers, routers
from keras_moe.inspection.alarms import ExpertAlarm
from tests.contract import D, tokens

E, STEPS = 4, 4
ADAPTING = {
    "bias": lambda **k: routers.SigmoidBiasRouter(E, 2, bias_update_rate=0.1, **k),
    "penalty": lambda **k: routers.ReLURouter(E, 2, initial_penalty=0.1, **k),
}


def model_of(router, steps=None):
    model = keras.Sequential(
        [keras.Input((D,)), layers.MoE(E, 8, router=router, seed=1), keras.layers.Dense(1)]
    )
    optimizer = keras.optimizers.SGD(0.1, gradient_accumulation_steps=steps)
    model.compile(optimizer, "mse")
    keras.utils.set_random_seed(5)
    rng = np.random.default_rng(5)
    model.set_weights([rng.normal(size=w.shape) if w.ndim > 1 else w for w in model.get_weights()])
    return model


def skewed(count):
    return np.abs(tokens(count)[:, 0]) + 0.5


def state_of(model, name):
    return ops.convert_to_numpy(getattr(model.layers[0].router, name))


@pytest.mark.parametrize("name", ADAPTING)
def test_accumulated_batches_change_it_as_one_batch_does(name):
    x = skewed(8 * STEPS)
    whole = model_of(ADAPTING[name]())
    whole.fit(x, x[:, :1], batch_size=len(x), epochs=2, shuffle=False, verbose=0)
    parts = model_of(ADAPTING[name](update_every=STEPS), STEPS)
    parts.fit(x, x[:, :1], batch_size=8, epochs=2, shuffle=False, verbose=0)

    start = state_of(model_of(ADAPTING[name]()), name)
    assert not np.array_equal(state_of(whole, name), start)
    np.testing.assert_allclose(state_of(parts, name), state_of(whole, name), rtol=1e-6)
    if name == "penalty":  # its loss is no mean over tokens: the sum over parts is another
        return
    for part, one in zip(parts.trainable_weights, whole.trainable_weights, strict=True):
        np.testing.assert_allclose(
            ops.convert_to_numpy(part), ops.convert_to_numpy(one), rtol=1e-3, atol=1e-5
        )


@pytest.mark.parametrize("name", ADAPTING)
def test_it_waits_and_a_saved_model_goes_on_waiting(name, tmp_path):
    x = skewed(8)
    model = model_of(ADAPTING[name](update_every=3))
    start = state_of(model, name)
    model.fit(x, x[:, :1], batch_size=4, verbose=0)  # two batches
    np.testing.assert_array_equal(state_of(model, name), start)
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    loaded.fit(x[:4], x[:4, :1], batch_size=4, verbose=0)  # the third one
    assert not np.array_equal(state_of(loaded, name), start)


@pytest.mark.one_backend("attributes of optimizers")
@pytest.mark.parametrize(
    ("every", "steps", "warns"), [(1, 4, True), (4, None, True), (4, 4, False), (1, None, False)]
)
def test_the_monitor_warns_where_router_and_optimizer_disagree(every, steps, warns):
    x = skewed(4)
    model = model_of(ADAPTING["bias"](update_every=every), steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.fit(x, x[:, :1], verbose=0, callbacks=[callbacks.ExpertMonitor()])
    messages = [str(w.message) for w in caught if issubclass(w.category, ExpertAlarm)]
    assert any(f"`update_every={steps or 1}`" in message for message in messages) == warns


@pytest.mark.one_backend("attributes of optimizers")
def test_the_monitor_looks_into_an_optimizer_that_scales_the_loss():
    x = skewed(4)
    model = model_of(ADAPTING["bias"]())
    inner = keras.optimizers.SGD(0.1, gradient_accumulation_steps=4)
    model.compile(keras.optimizers.LossScaleOptimizer(inner), "mse")
    with pytest.warns(ExpertAlarm, match="`update_every=4`"):
        model.fit(x, x[:, :1], verbose=0, callbacks=[callbacks.ExpertMonitor()])


@pytest.mark.one_backend("a check of arguments")
@pytest.mark.parametrize("name", ADAPTING)
def test_a_number_of_batches_is_positive(name):
    with pytest.raises(ValueError, match="`update_every` must be a positive integer"):
        ADAPTING[name](update_every=0)
