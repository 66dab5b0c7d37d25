"""A model with a mixture is exported for any batch size, and gives what it gave.

TensorFlow and JAX write a SavedModel, by `model.export(path)` and nothing else. PyTorch exports by
`torch.export`. Every way of dispatching, and every layer.
"""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import exporting, layers
from keras_moe.dispatch import PaddedBlocksDispatcher
from tests import helpers
from tests.helpers import randomize_weights

BACKEND = keras.backend.backend()
D = 6
ALIKE = {"activation": "relu"}  # which every format has
LAYERS = {
    "auto": lambda: layers.MoE(8, 8, **ALIKE),
    "walk": lambda: layers.MoE(4, 8, dispatch="walk", **ALIKE),
    "padded blocks": lambda: layers.MoE(4, 8, dispatch=PaddedBlocksDispatcher(4), **ALIKE),
    "dense": lambda: layers.MoE(4, 8, dispatch="dense", **ALIKE),
    "lookup": lambda: layers.MoE(4, 8, dispatch="lookup", **ALIKE),
    "capacity": lambda: layers.MoE(4, 8, capacity_factor=0.7, **ALIKE),
    "capacity per example": lambda: layers.MoE(
        4, 8, capacity_factor=0.7, capacity_group="example", **ALIKE
    ),
    "einsum": lambda: layers.MoE(4, 8, capacity_factor=0.7, dispatch="einsum", **ALIKE),
    "expert choice": lambda: layers.MoE(4, 8, router="expert_choice", **ALIKE),
    "no token left": lambda: layers.MoE(4, 8, router="no_token_left", capacity_factor=0.7, **ALIKE),
    "example level": lambda: layers.MoE(4, 8, routing_level="example", **ALIKE),
    "Keras layers": lambda: layers.MoE(3, experts=keras.layers.Dense(D)),
    "gated and shared": lambda: layers.MoE(4, 8, experts="glu", num_shared_experts=1, **ALIKE),
    "switch": lambda: layers.SwitchFFN(4, 8),
    "soft": lambda: layers.SoftMoE(4, 8, **ALIKE),
    "soft and causal": lambda: layers.SoftMoE(3, 8, causal=True, **ALIKE),
    "mmoe": lambda: layers.MMoE(4, D, tasks=2),
}
# Loops over rounds, sums over segments and einsums of unknown sizes, which `torch.export` refuses.
NOT_ON_TORCH = {"no token left", "expert choice", "einsum"}
# What ONNX, OpenVINO and LiteRT do not have.
REFUSED = {"LowerBound", "UpperBound", "BitwiseAnd", "While", "StatelessWhile", "Case"}
# On TensorFlow a file holds the graph that `test_operations_that_formats_have` makes of each layer.
# JAX has every kind of index arithmetic, but not the layers that share it.
SHARE = {"dense", "example level", "gated and shared", "switch", "soft"}
SAVED = [name for name in LAYERS if name not in SHARE]
if BACKEND == "tensorflow":
    SAVED = ["auto", "no token left", "Keras layers", "soft and causal", "mmoe"]


def model_of(name):
    inputs = keras.Input((5, D))
    mixed = keras.tree.flatten(LAYERS[name]()(inputs))
    model = keras.Model(inputs, keras.layers.Add()(mixed) if len(mixed) > 1 else mixed[0])
    randomize_weights(model)
    return model


def tokens(batch):
    return np.random.default_rng(batch).normal(size=(batch, 5, D)).astype("float32")


def check_equal(served, model):
    for batch in (1, 9):
        expected, _ = helpers.call(model, tokens(batch))
        np.testing.assert_allclose(served(tokens(batch)), expected, rtol=1e-5, atol=1e-5)


of_keras = pytest.mark.filterwarnings("ignore:The `native_serialization` parameter")


@of_keras
@pytest.mark.skipif(BACKEND == "torch", reason="Keras needs torch_xla for it")
@pytest.mark.parametrize("name", SAVED)
def test_saved_model(name, tmp_path):
    import tensorflow as tf

    model = model_of(name)
    model.export(tmp_path, verbose=False)
    loaded = tf.saved_model.load(tmp_path)
    check_equal(lambda x: loaded.serve(x).numpy(), model)


@of_keras
@pytest.mark.skipif(BACKEND == "torch", reason="Keras needs torch_xla for it")
def test_saved_model_of_unknown_length(tmp_path):
    import tensorflow as tf

    inputs = keras.Input((None, D))
    model = keras.Model(inputs, layers.SwitchFFN(4, 8)(layers.MoE(4, 8, **ALIKE)(inputs)))
    model.export(tmp_path, verbose=False)
    loaded = tf.saved_model.load(tmp_path)
    for shape in [(3, 4, D), (1, 1, D), (2, 7, D)]:
        x = np.random.default_rng(0).normal(size=shape).astype("float32")
        expected = model.predict_on_batch(x)
        np.testing.assert_allclose(loaded.serve(x).numpy(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(BACKEND != "torch", reason="of PyTorch")
@pytest.mark.parametrize("name", sorted(set(LAYERS) - NOT_ON_TORCH))
def test_torch_export(name):
    """Seen by the layer itself: it needs no `exporting`."""
    import torch

    model = model_of(name)
    batch = torch.export.Dim("batch", min=1)
    example = (torch.from_numpy(tokens(4)),)
    program = torch.export.export(
        model, example, dynamic_shapes=(({0: batch},),), strict=False
    ).module()
    check_equal(lambda x: program(torch.from_numpy(x)).detach().numpy(), model)


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow names its operations")
@pytest.mark.parametrize("name", sorted(set(LAYERS) - {"no token left"}))
def test_operations_that_formats_have(name):
    """Inside of `exporting` no loop, search or bit operation is left."""
    import tensorflow as tf

    model = model_of(name)

    @tf.function(input_signature=[tf.TensorSpec((None, 5, D))])
    def serve(x):
        return model(x, training=False)

    with exporting():
        graph = serve.get_concrete_function().graph.as_graph_def()
    used = {node.op for node in graph.node}
    used |= {node.op for function in graph.library.function for node in function.node_def}
    assert not used & REFUSED
    check_equal(lambda x: serve(x).numpy(), model)


def test_the_context_takes_the_loop_away():
    """The default dispatch is a loop; inside of `exporting` it gives the same without one."""
    layer = layers.MoE(8, 8, **ALIKE)
    assert layer.dispatch_plan(4096).dispatcher == "walk"
    x = np.random.default_rng(0).normal(size=(40, D)).astype("float32")
    outside = ops.convert_to_numpy(layer(x))
    with exporting():
        inside = ops.convert_to_numpy(layer(x))
    np.testing.assert_allclose(inside, outside, rtol=1e-5, atol=1e-6)
