"""Under a mixed precision, weights are cast where they are used: those of experts with tokens."""

import re

import keras
import numpy as np
import pytest

from keras_moe import layers
from tests import helpers

EXPERTS, WIDTH, HIDDEN = 16, 24, 40
BACKEND = keras.backend.backend()


def make(dtype, **arguments):
    layer = layers.MoE(EXPERTS, HIDDEN, dtype=dtype, seed=0, **arguments)
    layer.build((None, WIDTH))
    helpers.randomize_weights(layer, size=0.3)
    return layer


def tokens(count):
    return np.random.default_rng(1).normal(size=(count, WIDTH)).astype("float32")


@pytest.mark.parametrize("experts", ["mlp", "glu"])
@pytest.mark.parametrize("dispatch", ["walk", "grouped"])
@pytest.mark.parametrize("dtype", ["mixed_bfloat16", "mixed_float16"])
def test_values_and_gradients_are_those_of_the_whole_bank_cast(dtype, dispatch, experts):
    if BACKEND == "tensorflow" and dispatch == "grouped":
        pytest.skip("TensorFlow has no grouped matmul.")
    results = {}
    for name in (dispatch, "dense"):
        layer = make(dtype, dispatch=name, experts=experts)
        cotangents = np.random.default_rng(2).normal(size=(40, WIDTH)).astype("float32")
        outputs, _, gradients = helpers.values_and_gradients(
            layer, tokens(40), cotangents, outputs_of=lambda y: keras.ops.cast(y, "float32")
        )
        results[name] = {"outputs": outputs, **gradients}
    assert all(
        gradient.dtype == np.float32
        for path, gradient in results[dispatch].items()
        if "experts" in path
    )
    tolerance = 2e-2 if dtype == "mixed_bfloat16" else 3e-3
    helpers.assert_all_close(results[dispatch], results["dense"], tolerance=tolerance)


@pytest.mark.parametrize("training", [False, True])
def test_no_whole_bank_is_cast_for_a_few_tokens(training):
    layer, x = make("mixed_bfloat16", dispatch="walk", top_k=2), tokens(2).astype("float32")
    whole = {(EXPERTS, WIDTH, HIDDEN), (EXPERTS, HIDDEN, WIDTH)}
    assert not whole & casts(layer, x, training)
    assert whole & casts(make("mixed_bfloat16", dispatch="dense"), x, training)  # as all are used


def casts(layer, x, training):
    """The shapes of what is made in bfloat16 in a call."""
    return {"jax": _casts_on_jax, "tensorflow": _casts_on_tensorflow, "torch": _casts_on_torch}[
        BACKEND
    ](layer, x, training)


def _casts_on_jax(layer, x, training):
    import jax

    trained, others = (
        [v.value for v in variables]
        for variables in (layer.trainable_variables, layer.non_trainable_variables)
    )
    lowered = jax.jit(
        lambda trained, x: layer.stateless_call(trained, others, x, training=training)[0]
    ).lower(trained, x)
    shapes = re.findall(r"tensor<([\dx]+)xbf16>", lowered.as_text())
    return {tuple(map(int, shape.split("x"))) for shape in shapes}


def _casts_on_tensorflow(layer, x, training):
    import tensorflow as tf

    function = tf.function(lambda x: layer(x, training=training), jit_compile=False)
    concrete = function.get_concrete_function(tf.TensorSpec(x.shape))
    return {
        tuple(output.shape)
        for operation in concrete.graph.get_operations()
        for output in operation.outputs
        if output.dtype == tf.bfloat16 and output.shape.rank is not None
    }


def _casts_on_torch(layer, x, training):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    found = set()

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.bfloat16:
                found.add(tuple(result.shape))
            return result

    with Watch():
        layer(torch.from_numpy(x), training=training)
    return found
