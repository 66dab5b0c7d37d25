"""Weights of a layer of another size: the message names the size, as the constructor has it."""

import keras
import numpy as np
import pytest

from keras_moe import layers, routers

# Keras's own, about a functional model of which a layer could not be loaded.
pytestmark = pytest.mark.filterwarnings("ignore:Skipping nested container")
D = 6


class Around(keras.layers.Layer):
    """Calls a part of a layer alone."""

    def __init__(self, part, rank):
        super().__init__()
        self.part, self.rank = part, rank

    def call(self, inputs):
        x = inputs if self.rank == 2 else keras.ops.expand_dims(inputs, 0)
        return keras.ops.sum(keras.tree.flatten(self.part(x))[0])


def dense_experts(count):
    return [keras.layers.Dense(D) for _ in range(count)]


# What is loaded into, what was saved, the size here and the size there.
CASES = {
    "moe": lambda: (layers.MoE(4, 8), layers.MoE(8, 8), "num_experts=4", "num_experts=8"),
    "switch": lambda: (
        layers.SwitchFFN(8, 8),
        layers.SwitchFFN(4, 8),
        "num_experts=8",
        "num_experts=4",
    ),
    "keras_experts": lambda: (
        layers.MoE(4, experts=keras.layers.Dense(D)),
        layers.MoE(8, experts=keras.layers.Dense(D)),
        "num_experts=4",
        "num_experts=8",
    ),
    "hidden": lambda: (layers.MoE(4, 8), layers.MoE(4, 16), "units=8, ", "units=16, "),
    "soft": lambda: (layers.SoftMoE(4, 8), layers.SoftMoE(2, 8), "num_experts=4", "num_experts=2"),
    "soft_slots": lambda: (
        layers.SoftMoE(4, 8, slots_per_expert=2),
        layers.SoftMoE(4, 8),
        "slots_per_expert=2",
        "slots_per_expert=1",
    ),
    "mmoe": lambda: (
        layers.MMoE(4, [8], 2),
        layers.MMoE(8, [8], 2),
        "num_experts=4",
        "num_experts=8",
    ),
    "mmoe_tasks": lambda: (layers.MMoE(4, [8], 2), layers.MMoE(4, [8], 3), "tasks=2", "tasks=3"),
    "mmoe_both": lambda: (
        layers.MMoE(4, [8], 2),
        layers.MMoE(6, [8], ["a", "b", "c"]),
        "tasks=2, num_experts=4",
        "tasks=3, num_experts=6",
    ),
    "bank": lambda: (
        Around(layers.ExpertMLP(4, [8, D]), 3),
        Around(layers.ExpertMLP(8, [8, D]), 3),
        "num_experts=4",
        "num_experts=8",
    ),
    "layer_bank": lambda: (
        Around(layers.LayerExperts(dense_experts(2), 2), 3),
        Around(layers.LayerExperts(dense_experts(3), 3), 3),
        "num_experts=2",
        "num_experts=3",
    ),
    "router": lambda: (
        Around(routers.TopKRouter(4), 2),
        Around(routers.TopKRouter(8), 2),
        "num_experts=4",
        "num_experts=8",
    ),
    "noisy_router": lambda: (
        Around(routers.NoisyTopKRouter(4), 2),
        Around(routers.NoisyTopKRouter(8), 2),
        "num_experts=4",
        "num_experts=8",
    ),
    "bias_router": lambda: (
        Around(routers.SigmoidBiasRouter(4), 2),
        Around(routers.SigmoidBiasRouter(8), 2),
        "num_experts=4",
        "num_experts=8",
    ),
    "hash_router": lambda: (
        Around(routers.HashRouter(4), 2),
        Around(routers.HashRouter(8), 2),
        "num_experts=4",
        "num_experts=8",
    ),
    "soft_router": lambda: (
        Around(routers.SoftRouter(4, 2), 3),
        Around(routers.SoftRouter(4, 1), 3),
        "slots_per_expert=2",
        "slots_per_expert=1",
    ),
    "gates": lambda: (
        Around(routers.SoftmaxGate(4, 2), 2),
        Around(routers.SoftmaxGate(4, 3), 2),
        "num_tasks=2",
        "num_tasks=3",
    ),
}


def built(layer, width=D):
    inputs = keras.Input((width,))
    outputs = keras.tree.flatten(layer(inputs))
    return keras.Model(inputs, outputs)


@pytest.mark.parametrize("case", CASES)
def test_the_message_names_the_size(case, tmp_path):
    here, there, expected, received = CASES[case]()
    path = tmp_path / "model.weights.h5"
    built(there).save_weights(path)
    message = rf"must be loaded from a file with {expected}.*\. Received: {received}"
    with pytest.raises(ValueError, match=message):
        built(here).load_weights(path)


def test_the_width_of_the_inputs(tmp_path):
    path = tmp_path / "model.weights.h5"
    built(Around(routers.TopKRouter(4), 2), width=8).save_weights(path)
    with pytest.raises(ValueError, match=r"input width=6\. Received: input width=8"):
        built(Around(routers.TopKRouter(4), 2)).load_weights(path)


def test_a_mismatch_can_still_be_skipped(tmp_path):
    path = tmp_path / "model.weights.h5"
    built(layers.MoE(8, 8)).save_weights(path)
    with pytest.warns(UserWarning, match="num_experts=4. Received: num_experts=8"):
        built(layers.MoE(4, 8)).load_weights(path, skip_mismatch=True)


def test_equal_sizes_are_loaded(tmp_path):
    path = tmp_path / "model.weights.h5"
    x = np.random.default_rng(0).normal(size=(5, D)).astype("float32")
    for make in (
        lambda: layers.MoE(4, experts=keras.layers.Dense(D)),
        lambda: layers.MoE(4, 8, router="noisy_top_k"),
    ):
        saved, loaded = built(make()), built(make())
        saved.save_weights(path)
        loaded.load_weights(path)
        np.testing.assert_array_equal(saved.predict(x, verbose=0), loaded.predict(x, verbose=0))


def test_a_file_from_before_the_number_of_experts_was_stored():
    bank = layers.LayerExperts(keras.layers.Dense(D), 2)
    bank.load_own_variables({})
    with pytest.raises(ValueError, match=r"num_experts=2\. Received: num_experts=3"):
        bank.load_own_variables({"num_experts": np.asarray(3)})
