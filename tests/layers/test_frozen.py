"""What is frozen does not train, whenever it was frozen, and stays frozen in a file."""

import keras
import numpy as np
import pytest

from keras_moe import layers
from keras_moe.models import QKNormAttention
from tests.contract import D, arrays, tokens
from tests.helpers import some_everywhere

MIXTURES = {
    "bias": lambda **k: layers.MoE(4, 8, router="sigmoid_bias", num_shared_experts=1, **k),
    "penalty": lambda **k: layers.MoE(4, 8, router="relu", **k),
    "switch": lambda **k: layers.SwitchFFN(4, 8, **k),
    "soft": lambda **k: layers.SoftMoE(4, 8, **k),
    "mmoe": lambda **k: layers.MMoE(4, D, tasks=1, gate_units=[5], **k),
    "Keras layers": lambda **k: layers.MoE(3, experts=Late(), **k),
}
# What a layer counts goes on, and so does its noise.
GOES_ON = {"load", "totals", "batches", "worst", "importance", "entropy", "decisions"}
GOES_ON |= {"seed_generator_state"}


@keras.saving.register_keras_serializable(package="keras_moe_tests")
class Late(keras.layers.Layer):
    """An expert that makes its sublayer in `build`, as Keras's attention does."""

    def build(self, input_shape):
        self.dense = keras.layers.Dense(D)
        self.dense.build(input_shape)

    def call(self, x):
        return self.dense(x)


def model_of(mixture):
    """A mixture between two dense layers that train."""
    inputs = keras.Input((5, D))
    x = keras.layers.Dense(D, name="before")(inputs)
    x = keras.tree.flatten(mixture(x))[0]
    return keras.Model(inputs, keras.layers.Dense(D, name="after")(x))


def changed(model):
    """Trains for two epochs and returns the paths of what moved."""
    model.compile(keras.optimizers.SGD(0.5), "mse")
    x = tokens(8)
    before = {v.path: arrays(v)[0].copy() for v in model.variables}
    model.fit(x, np.sin(x), batch_size=4, epochs=2, verbose=0)
    return {
        v.path
        for v in model.variables
        if not np.array_equal(arrays(v)[0], before[v.path]) and v.name not in GOES_ON
    }


AROUND = {f"{place}/{name}" for place in ("before", "after") for name in ("kernel", "bias")}


# What a batch moves beside gradients, and experts that Keras makes late. The rest is no more than
# which variables Keras hands to the optimizer.
EVERYWHERE = ["bias", "penalty", "Keras layers"]


@pytest.mark.parametrize(
    "name", some_everywhere(list(MIXTURES), EVERYWHERE, "Keras chooses the variables that train")
)
def test_only_what_is_around_it_trains(name, tmp_path):
    """Not the selection bias, the penalty or anything else that a batch moves either."""
    frozen = MIXTURES[name](name="mixture")
    frozen.trainable = False
    model = model_of(frozen)
    assert changed(model) == AROUND
    assert not model.losses
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    for other in (again, keras.models.clone_model(model)):
        assert not other.get_layer("mixture").trainable
        assert {v.path for v in other.trainable_variables} == AROUND
    assert changed(again) == AROUND


@pytest.mark.parametrize(
    "when", some_everywhere(["before", "after"], ["after"], "flags of variables, set in Python")
)
@pytest.mark.parametrize("part", ["router", "experts"])
def test_a_part_alone(part, when, tmp_path):
    mixture = layers.MoE(4, 8, router="sigmoid_bias", name="mixture")
    if when == "after":
        mixture.build((None, 5, D))
    getattr(mixture, part).trainable = False
    model = model_of(mixture)
    moved = changed(model)
    own = {path for path in moved if path.startswith("mixture/")}
    assert own and not any(path.startswith(f"mixture/{part}/") for path in own)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert {v.path for v in again.trainable_variables} == {
        v.path for v in model.trainable_variables
    }
    assert changed(again) == moved


def test_one_expert_of_a_list(tmp_path):
    experts = [keras.layers.Dense(D) for _ in range(3)]
    experts[1].trainable = False
    model = model_of(layers.MoE(3, experts=experts, name="mixture"))
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    for each in (model, again):
        trained = [e.trainable_variables for e in each.get_layer("mixture").experts.experts]
        assert [len(variables) for variables in trained] == [2, 0, 2]


def test_the_router_alone_is_unfrozen():
    """Fine-tuning of the router: everything frozen, then one part let go."""
    mixture = layers.MoE(4, 8, name="mixture")
    mixture.trainable = False
    mixture.router.trainable = True
    model = model_of(mixture)
    assert changed(model) == AROUND | {"mixture/router/kernel"}


def test_attention_with_normalised_queries():
    """Keras's own attention trains its projections where it was frozen before it was built."""
    attention = QKNormAttention(2, 3, trainable=False)
    x = keras.Input((5, D))
    attention(x, x)
    assert not [v.path for v in attention.variables if v.trainable]
