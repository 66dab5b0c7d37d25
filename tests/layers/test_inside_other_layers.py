"""Mixtures inside of layers of one's own, the usual way to write the block of a Transformer.

Keras finds such a layer's output shape by tracing its `call`, on JAX with symbols for unknown
sizes. `check_inside_other_layers` of the contract does so for every layer, router and kind of
experts; here is every way of dispatching, what the contract has no case for, and training.
"""

import keras
import numpy as np
import pytest

from keras_moe import layers, routers
from keras_moe.dispatch import PaddedBlocksDispatcher
from tests.contract import Block, Subclassed, arrays, tokens

D = 6
DISPATCH = {
    "walk": {"dispatch": "walk"},
    "padded blocks": {"dispatch": PaddedBlocksDispatcher(4)},
    "blocks of Keras layers": {"experts": keras.layers.Dense(D), "hidden_dim": None},
    "dense": {"dispatch": "dense"},
    "lookup": {"dispatch": "lookup"},
    "capacity": {"capacity_factor": 1.3},
    "capacity above all": {"capacity_factor": 9.0, "eval_capacity_factor": 0.3},
    "capacity per example": {"capacity_factor": 0.9, "capacity_group": "example"},
    "capacity of Keras layers": {
        "experts": keras.layers.Dense(D),
        "hidden_dim": None,
        "capacity_factor": 1.0,
    },
    "einsum": {"capacity_factor": 1.1, "dispatch": "einsum"},
    "einsum per example": {
        "capacity_factor": 1.1,
        "dispatch": "einsum",
        "capacity_group": "example",
    },
    "expert choice": {"router": "expert_choice"},
    "expert choice per example": {"router": "expert_choice", "capacity_group": "example"},
}


@pytest.mark.parametrize("rank", [2, 3])
@pytest.mark.parametrize("name", DISPATCH)
def test_every_dispatch(name, rank):
    # PyTorch stands in large numbers for unknown sizes, and an einsum has a mask of all of them.
    shape = (D,) if rank == 2 else (7 if "einsum" in name else None, D)
    layer = layers.MoE(4, **{"hidden_dim": 8, **DISPATCH[name]})
    outputs = Block(layer)(keras.Input(shape), training=True)
    assert tuple(outputs.shape) == (None, *shape)


def test_a_layer_without_anything_else():
    """No `build`, no mask, no config: eight lines, as they stand in a notebook."""

    class Residual(keras.layers.Layer):
        def __init__(self, ffn):
            super().__init__()
            self.ffn = ffn

        def call(self, x):
            return x + self.ffn(x)

    for layer in (layers.MoE(3, 8), layers.SwitchFFN(3, 8)):
        outputs = Residual(layer)(keras.Input((7, D)))
        assert tuple(outputs.shape) == (None, 7, D)


def test_token_ids_go_through():
    class Hashed(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.embed = keras.layers.Embedding(9, D)
            self.mix = layers.MoE(3, 8, router=routers.TokenHashRouter(3, 9))

        def call(self, ids):
            return self.mix(self.embed(ids), token_ids=ids)

    assert tuple(Hashed()(keras.Input((None,), dtype="int32")).shape) == (None, None, D)


MIXTURES = {
    "moe": lambda: layers.MoE(4, 8),
    "switch": lambda: layers.SwitchFFN(4, 8),
    "soft": lambda: layers.SoftMoE(4, 8),
    "mmoe": lambda: layers.MMoE(4, D, tasks=2),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_fit_save_and_load(name, tmp_path):
    inputs = keras.Input((None, D))
    model = keras.Model(inputs, Block(MIXTURES[name]())(inputs))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = tokens(6)
    before = [w.copy() for w in model.get_weights()]
    history = model.fit(x, np.sin(x), batch_size=3, epochs=2, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    trained = {v.path for v in model.trainable_variables}
    for variable, old in zip(model.weights, before, strict=True):
        assert variable.path not in trained or not np.array_equal(arrays(variable)[0], old)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(again.predict_on_batch(x), model.predict_on_batch(x))


def test_subclassed_model_fits():
    """Built by `fit` itself, from a batch whose size it does not know."""
    model = Subclassed(Block(layers.MoE(4, 8)))
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = tokens(5)
    losses = model.fit(x, np.sin(x), batch_size=2, epochs=3, verbose=0).history["loss"]
    assert losses[-1] < losses[0]
