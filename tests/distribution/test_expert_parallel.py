"""What `expert_parallel` and `assert_sharded` refuse, and how they say it."""

import json
import os
import subprocess
import sys

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe import layers

on_jax = pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX divides")


@pytest.mark.skipif(keras.backend.backend() == "jax", reason="JAX divides")
def test_other_backends_are_refused():
    with pytest.raises(ValueError, match="on JAX only: set KERAS_BACKEND=jax"):
        keras_moe.distribution.expert_parallel()


@on_jax
@pytest.mark.parametrize("data", [2, 3])
def test_data_must_divide_the_devices(data):
    with pytest.raises(ValueError, match=f"number of devices, 1.*Received: data={data}"):
        keras_moe.distribution.expert_parallel(["cpu:0"], data=data)


@on_jax
def test_a_model_without_experts_is_refused():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    with pytest.raises(ValueError, match="must have experts, and be built"):
        keras_moe.distribution.assert_sharded(model)


def test_what_is_on_every_device_is_named():
    model = keras.Sequential(
        [
            keras.Input((4,)),
            layers.MoE(2, 8, name="bank"),
            layers.MoE(2, experts=keras.layers.Dense(4), name="layers"),
        ]
    )
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    with pytest.raises(ValueError, match="Each device has all experts of") as error:
        keras_moe.distribution.assert_sharded(model)
    for name in ("bank/experts/kernel_0", "bank_experts_kernel_0_momentum", "layers/experts"):
        assert name in str(error.value)
    assert "router" not in str(error.value)


SCRIPT = """
import json, os, sys

os.environ["KERAS_BACKEND"] = "jax"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
import keras, numpy as np
import keras_moe
from keras_moe import layers

def message(function):
    try:
        function()
    except ValueError as error:
        return str(error)

def build(experts, data=1, rules=None):
    keras.distribution.set_distribution(
        keras_moe.distribution.expert_parallel(data=data, rules=rules)
    )
    model = keras.Sequential([keras.Input((4,)), layers.MoE(experts, 8, name="moe")])
    model.compile("sgd", "mse")
    return model

not_divided = message(lambda: build(6))
model, x = build(8, data=2), np.ones((6, 4), "float32")
found = {
    "experts": not_divided,
    "batch": message(lambda: model.fit(x[:5], x[:5], batch_size=5, verbose=0)),
    "fits": message(lambda: model.fit(x, x, batch_size=2, verbose=0)),
    "sharded": message(lambda: keras_moe.distribution.assert_sharded(model)),
    "direct": message(lambda: model(x[:5])),
    "same": [np.asarray(model(x[:n])).tolist() for n in (3, 6)],
}
layer = build(8, rules={".*router/kernel": (None, "expert")}).get_layer("moe")
found["rules"] = list(map(str, layer.router.kernel.value.sharding.spec))
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def found():
    process = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, text=True, env=dict(os.environ)
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)


@on_jax
def test_a_mesh_must_divide_the_experts(found):
    assert "moe/experts/kernel_0` has an axis of 6" in found["experts"]
    assert "axis 'expert' has 4 devices" in found["experts"]


@on_jax
def test_a_mesh_must_divide_the_batch(found):
    assert "'batch', which has 2 devices" in found["batch"]
    assert "drop_remainder=True" in found["batch"] and "Received: examples=5" in found["batch"]
    assert found["fits"] is None and found["sharded"] is None


@on_jax
def test_a_direct_call_takes_any_batch(found):
    assert found["direct"] is None
    three, six = found["same"]
    np.testing.assert_allclose(six[:3], three, rtol=1e-5)


@on_jax
def test_rules_of_ones_own_are_added(found):
    assert found["rules"] == ["None", "expert"]
