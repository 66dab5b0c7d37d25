"""Training that is saved, loaded and gone on with equals training that was not interrupted."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import layers, routers
from tests.contract import D
from tests.helpers import some_everywhere

E, V, LENGTH, STEPS = 4, 9, 5, 3

# What a router carries from batch to batch: state that follows the load, seeds, drawn tables.
CASES = {
    "top_k": lambda: routers.TopKRouter(E, jitter=0.2),
    "switch": lambda: routers.SwitchRouter(E, jitter=0.2),
    "noisy_top_k": lambda: routers.NoisyTopKRouter(E),
    "batch_priority": lambda: routers.BatchPriorityRouter(E, noise_std=1.0),
    "no_token_left": lambda: routers.NoTokenLeftRouter(E, 2, capacity_factor=0.7, jitter=0.2),
    "sigmoid_bias": lambda: routers.SigmoidBiasRouter(E, 2, bias_update_rate=0.1),
    "sinkhorn": lambda: routers.SinkhornRouter(E, jitter=0.2),
    "expert_choice": lambda: routers.ExpertChoiceRouter(E, jitter=0.2),
    "relu": lambda: routers.ReLURouter(E, 2, initial_penalty=0.1),
    "dselect_k": lambda: routers.DSelectKRouter(E, jitter=0.2),
    "dense": lambda: routers.DenseRouter(E, jitter=0.2),
    "hash": lambda: routers.HashRouter(E, 2),
    "token_hash": lambda: routers.TokenHashRouter(E, V, 2),
    "random": lambda: routers.RandomRouter(E, 2),
    "uniform": lambda: routers.UniformRouter(E),
}
CHANGES = {  # in training, and by what name
    "sigmoid_bias": "bias",
    "relu": "penalty",
    **dict.fromkeys(("top_k", "switch", "noisy_top_k", "random"), "seed_generator_state"),
}


def model_of(router):
    ids = keras.Input((LENGTH,), dtype="int32")
    embedded = keras.layers.Embedding(V, D, mask_zero=True)(ids)
    layer = layers.MoE(E, 8, router=router, dropout=0.1, seed=4)
    model = keras.Model(ids, layer(embedded, token_ids=ids))
    model.compile(keras.optimizers.Adam(0.05), "mse")
    return model


def train(model, batches):
    for ids, targets in batches:
        model.train_on_batch(ids, targets)


def state_of(model):
    """Everything that is saved: weights, counts, seeds, and the optimizer's moments.

    What is counted by batch is not.
    """
    variables = [*model.variables, *model.optimizer.variables]
    return {
        f"{i} {v.path}": ops.convert_to_numpy(v).copy()
        for i, v in enumerate(variables)
        if not v.path.endswith(("/batches", "/worst"))
    }


# A seed, state that follows the load, drawn tables: the other routers have what these have.
EVERYWHERE = ["top_k", "noisy_top_k", "sigmoid_bias", "relu", "token_hash", "random"]


@pytest.mark.parametrize(
    "name", some_everywhere(CASES.keys(), EVERYWHERE, "no state of another kind than the others'")
)
def test_going_on_from_a_file_equals_going_on(name, tmp_path):
    rng = np.random.default_rng(0)
    batches = [
        (
            rng.integers(0, V, size=(6, LENGTH)).astype("int32"),
            rng.normal(size=(6, LENGTH, D)).astype("float32"),
        )
        for _ in range(2 * STEPS)
    ]
    model = model_of(CASES[name]())
    fresh = state_of(model)
    train(model, batches[:STEPS])
    model.save(tmp_path / "model.keras")
    saved = state_of(model)
    train(model, batches[STEPS:])

    keras.utils.set_random_seed(9)  # nothing may depend on what the process drew before
    again = keras.saving.load_model(tmp_path / "model.keras")
    for (path, loaded), expected in zip(state_of(again).items(), saved.values(), strict=True):
        np.testing.assert_array_equal(loaded, expected, err_msg=path)
    train(again, batches[STEPS:])
    finished = state_of(model).values()
    for (path, resumed), expected in zip(state_of(again).items(), finished, strict=True):
        np.testing.assert_array_equal(resumed, expected, err_msg=path)

    if name in CHANGES:
        moved = [path for path in fresh if (fresh[path] != saved[path]).any()]
        assert any(path.endswith(CHANGES[name]) for path in moved), moved


def test_every_router_is_resumed():
    classes = {type(make()) for make in CASES.values()}
    assert classes == {
        each
        for each in vars(routers).values()
        if isinstance(each, type)
        and issubclass(each, routers.Router)
        and each not in (routers.Router, routers.LinearRouter)
    }
