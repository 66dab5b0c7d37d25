"""The hypermodels: their defaults, what can be narrowed, and searches by every tuner."""

import os
import subprocess
import sys

import keras
import keras_tuner
import numpy as np
import pytest

from keras_moe import layers, tuning
from keras_moe.flops import active_flops
from keras_moe.models import features

pytestmark = [
    pytest.mark.one_backend("arithmetic on configurations"),
    pytest.mark.usefixtures("quick_search"),
    # KerasTuner loads a checkpoint's weights into a model that has not trained.
    pytest.mark.filterwarnings("ignore:Skipping variable loading for optimizer:UserWarning"),
]

SMALL = {"patch_size": 2, "width": 8, "depth": 2, "num_heads": 2}
KINDS = ("soft_moe", "moe", "switch", "dense")

rng = np.random.default_rng(0)
IMAGES = rng.normal(size=(16, 4, 4, 1)).astype("float32")
LABELS = rng.integers(0, 3, 16)
IDS = {"user": np.arange(16) % 5, "movie": np.arange(16) % 7}
RATINGS = {"watched": (np.arange(16) % 2).astype("float32"), "rating": 1.0 + np.arange(16) % 5}
FEATURES = [features.Categorical("user", 5, dim=2), features.Categorical("movie", 7, dim=2)]
TASKS = {"watched": "binary", "rating": "regression"}


def small_vit(**arguments):
    return tuning.HyperViTMoE((4, 4, 1), 3, **{**SMALL, "seed": 0, **arguments})


def small_recommender(**arguments):
    tiny = {"shared_units": (4, 8), "tower_units": 2, "mmoe": {"expert_units": 4}, "seed": 0}
    return tuning.HyperMMoERecommender(FEATURES, TASKS, **{**tiny, **arguments})


def built(hypermodel, **values):
    """The model for a point of the search, and the point."""
    hp = keras_tuner.HyperParameters()
    hypermodel.build(hp) if not values else None
    hp.values.update(values)
    return hypermodel.build(hp), hp


def weights_of(model):
    return [(w.path, keras.ops.convert_to_numpy(w)) for w in model.weights]


def assert_same_model(model, other):
    for (path, values), (other_path, other_values) in zip(
        weights_of(model), weights_of(other), strict=True
    ):
        assert path == other_path
        np.testing.assert_array_equal(values, other_values, err_msg=path)


# === One model ===


@pytest.mark.parametrize("kind", KINDS)
def test_every_feed_forward_costs_about_the_dense_model(kind):
    fixed = {"feed_forward": KINDS, "width": 32}
    hypermodel = tuning.HyperViTMoE((8, 8, 1), 3, **{**SMALL, **fixed})
    model, hp = built(hypermodel, feed_forward=kind)
    dense, _ = built(hypermodel, feed_forward="dense")
    assert hp.values["feed_forward"] == kind
    mixtures = [each for each in model.layers if isinstance(each, layers.MoE | layers.SoftMoE)]
    assert [each.name for each in mixtures] == ([] if kind == "dense" else [f"block_1_{kind}"])
    # The router, and for Soft MoE the mixing of tokens, come on top.
    assert 1.0 <= active_flops(model) / active_flops(dense) < 1.1
    assert all(mixture.hidden_dim * getattr(mixture, "top_k", 1) == 128 for mixture in mixtures)


def test_the_default_vit():
    model, hp = built(small_vit(moe_layers=["last_half", 1, (0,)], batch_size=(8, 16)))
    assert hp.values == {
        "dropout": 0.0,
        "feed_forward": "soft_moe",
        "moe_layers": "last_half",
        "learning_rate": 0.001,
        "batch_size": 8,
    }
    mixture = model.get_layer("block_1_soft_moe")
    assert (mixture.num_experts, mixture.slots_per_expert) == (4, 1)  # 4 patches
    assert model.loss.from_logits
    assert float(model.optimizer.learning_rate) == pytest.approx(0.001)


def test_what_fits_a_vit_can_be_narrowed():
    def factory(block):
        return layers.MoE(2, 4, name=f"own_{block}")

    hypermodel = small_vit(
        feed_forward=("moe", "switch", factory),
        moe_layers=[(0, 1), 2],
        moe={"num_experts": (2, 4), "hidden_dim": 6, "top_k": (1, 3)},
        switch={"capacity_factor": None, "num_experts": [2]},
        dropout=0.1,
        mlp_dim=24,
    )
    model, hp = built(hypermodel, **{"moe/num_experts": 2})
    assert hp.values["moe_layers"] == "(0, 1)"
    chosen = [model.get_layer(f"block_{block}_moe") for block in (0, 1)]
    assert [(e.num_experts, e.top_k, e.hidden_dim, e.dropout) for e in chosen] == [
        (2, 1, 6, 0.1)
    ] * 2
    model, _ = built(hypermodel, feed_forward="switch", moe_layers="2")
    switch = model.get_layer("block_1_switch")
    assert isinstance(switch, layers.SwitchFFN)
    assert (switch.num_experts, switch.capacity_factor, switch.hidden_dim) == (2, None, 24)
    model, _ = built(hypermodel, feed_forward="factory")
    assert isinstance(model.get_layer("own_0"), layers.MoE)


def test_sizes_by_name_set_the_experts_width():
    hypermodel = tuning.HyperViTMoE((32, 32, 3), 10, size=("Ti", "S"), depth=1, moe_layers=1)
    model, hp = built(hypermodel)
    assert hp.values["size"] == "Ti"
    assert model.get_layer("block_0_soft_moe").hidden_dim == 768


def test_the_default_recommender():
    model, hp = built(small_recommender())
    assert hp.values == {
        "shared_units": 4,
        "dropout": 0.2,
        "embedding_l2": 1e-4,
        "mmoe/num_experts": 4,
        "mmoe/gate_dropout": 0.0,
        "learning_rate": 0.001,
    }
    assert sorted(model.output) == ["rating", "watched"]
    model, _ = built(small_recommender(trunk=("mmoe", "shared_bottom")), trunk="shared_bottom")
    assert not any(isinstance(each, layers.MMoE) for each in model.layers)


@pytest.mark.parametrize("tasks", [TASKS, {"watched": "binary"}], ids=len)
def test_the_recommenders_losses_are_in_the_logs(tasks):
    hypermodel = tuning.HyperMMoERecommender(
        FEATURES, tasks, shared_units=4, mmoe={"expert_units": 4}, seed=0
    )
    model, hp = built(hypermodel)
    targets = {task: RATINGS[task] for task in tasks}
    weights = {task: np.ones(16, "float32") for task in tasks}
    data = (IDS, targets, weights)
    logs = hypermodel.fit(hp, model, *data[:2], validation_data=data, verbose=0).history
    assert set(hypermodel.task_losses) <= set(logs)
    assert ("val_watched_auc" if len(tasks) > 1 else "val_auc") in logs
    assert ("val_rating_rmse" in logs) == (len(tasks) > 1)


def test_a_seed_gives_the_same_model_and_no_seed_another():
    first, hp = built(small_vit(depth=1, moe_layers=1))
    assert_same_model(first, small_vit(depth=1, moe_layers=1).build(hp))
    unseeded = small_vit(depth=1, moe_layers=1, seed=None)
    weights = [unseeded.build(hp).get_layer("patch_embedding").kernel for _ in range(2)]
    assert not np.array_equal(*[keras.ops.convert_to_numpy(w) for w in weights])


def test_the_drawn_batch_size_is_used():
    class Model:
        def fit(self, *args, **kwargs):
            return args, kwargs

    for hypermodel in (small_vit(batch_size=(4, 8)), small_recommender(batch_size=(4, 8))):
        hp = keras_tuner.HyperParameters()
        hp.values["batch_size"] = 8
        assert hypermodel.fit(hp, Model(), 1, epochs=2) == ((1,), {"epochs": 2, "batch_size": 8})
    assert small_vit().fit(hp, Model(), batch_size=3) == ((), {"batch_size": 3})


# === Searches ===


# Hyperband of 2 epochs: 2 trials of 1 epoch, the better one goes on; then 2 trials of 2 epochs.
NUM_TRIALS = {"random": 2, "bayesian": 2, "hyperband": 5, "hyperband of 1 epoch": 1}


def tuner_of(name, hypermodel, cost, folder):
    common = {"objective": cost.objective, "seed": 1, "directory": folder, "project_name": name}
    if name.startswith("hyperband"):
        epochs = 2 if name == "hyperband" else 1
        return keras_tuner.Hyperband(hypermodel, max_epochs=epochs, factor=2, **common)
    if name == "bayesian":
        return keras_tuner.BayesianOptimization(
            hypermodel, max_trials=NUM_TRIALS[name], num_initial_points=1, **common
        )
    return keras_tuner.RandomSearch(hypermodel, max_trials=NUM_TRIALS[name], **common)


@pytest.mark.filterwarnings("ignore:.*length_scale.*")  # of a Gaussian process on two points
@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
@pytest.mark.parametrize(
    ("name", "job"),
    [
        ("random", "vit"),
        ("hyperband of 1 epoch", "vit"),
        ("bayesian", "vit"),
        ("random", "recommender"),
        ("hyperband", "recommender"),
        ("bayesian", "recommender"),
    ],
)
def test_every_tuner_searches(tmp_path, name, job):
    if job == "vit":
        hypermodel = small_vit(
            depth=1,
            moe_layers=1,
            feed_forward=("moe", "dense"),
            moe={"num_experts": (4, 2), "top_k": (1, 4)},
            dropout=0.0,
        )
        cost = tuning.ActiveCost("val_accuracy", "max", target_flops=1e4)
        data = (IMAGES, LABELS)
    else:
        hypermodel = small_recommender()
        cost = tuning.ActiveCost(hypermodel.task_losses, "min", target_parameters=1e3)
        data = (IDS, RATINGS)
    tuner = tuner_of(name, hypermodel, cost, tmp_path)
    epochs = {} if name.startswith("hyperband") else {"epochs": 1}
    tuner.search(*data, batch_size=16, validation_data=data, verbose=0, callbacks=[cost], **epochs)
    trials = list(tuner.oracle.trials.values())
    assert len(trials) == NUM_TRIALS[name]
    assert [t.status for t in trials] == ["COMPLETED"] * len(trials), trials[-1].message
    assert all(t.metrics.exists("active_flops") for t in trials)
    best = tuner.get_best_hyperparameters()[0]
    found = tuner.get_best_models()[0]
    rebuilt = hypermodel.build(best)
    assert [w.path for w in found.weights] == [w.path for w in rebuilt.weights]
    assert [w.shape for w in found.weights] == [w.shape for w in rebuilt.weights]
    saved = keras_tuner.HyperParameters.from_config(best.get_config())
    assert_same_model(rebuilt, hypermodel.build(saved))


def test_the_tuner_knows_the_space_after_one_model(tmp_path):
    hypermodel = small_vit(moe={"num_experts": (8, 2)}, moe_layers=[2, 1])
    count = 0
    build = hypermodel.build

    def counted(hp):
        nonlocal count
        count += 1
        return build(hp)

    hypermodel.build = counted
    tuner = keras_tuner.RandomSearch(
        hypermodel, objective="val_accuracy", max_trials=1, directory=tmp_path
    )
    assert count == 1
    declared = {each.name for each in tuner.oracle.get_space().space}
    assert {"moe/top_k", "moe/top_k_up_to_2", "switch/num_experts", "moe_layers"} <= declared


# === Bad input, and the optional package ===

BAD = [
    ({"feed_forward": ("moe", "sparse")}, r"`feed_forward` must be one of \['dense', 'moe'"),
    ({"feed_forward": ()}, r"`feed_forward` must be a value, or a sequence of at least one"),
    ({"feed_forward": "dense", "moe": {"top_k": 1}}, "`feed_forward` must include 'moe' where"),
    (
        {"switch": {"router_arguments": {"switch": {"jitter": 0.1}}}},
        "`switch` must leave out `router_arguments`: take 'moe' with",
    ),
    ({"depth": (2, 0)}, "`depth` must be a positive integer. Received: depth=0"),
    ({"dropout": 1.5}, r"`dropout` must be a number in \[0, 1\)"),
    ({"learning_rate": (0.1, 0)}, "`learning_rate` must be a number above 0"),
    ({"batch_size": 2.5}, "`batch_size` must be a positive integer"),
    ({"clip_norm": -1}, "`clip_norm` must be a number above 0"),
    ({"seed": "a"}, "`seed` must be an integer or None"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments_of_a_vit(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_vit(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 3}, "`input_shape` must divide into whole patches"),
        ({"moe": {"num_experts": 0}}, "`num_experts` must be a positive integer"),
        ({"moe_layers": [(0, 5)]}, "`moe_layers` must be an integer between 0 and depth - 1"),
        ({"soft_moe": {"num_experts": 99}}, "`num_slots` must be at least 99"),
    ],
)
def test_a_bad_vit_fails_when_the_tuner_is_made(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        keras_tuner.RandomSearch(
            small_vit(**arguments), objective="val_accuracy", directory=tmp_path
        )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mmoe": {"dropout": 0.1}}, "`mmoe` must not set the experts' `dropout`"),
        ({"dropout": -1}, r"`dropout` must be a number in \[0, 1\)"),
        ({"embedding_l2": "a"}, "`embedding_l2` must be a number of at least 0"),
        ({"learning_rate": []}, "`learning_rate` must be a value, or a sequence"),
        ({"batch_size": 0}, "`batch_size` must be a positive integer"),
    ],
)
def test_bad_arguments_of_a_recommender(arguments, message):
    with pytest.raises(ValueError, match=message):
        small_recommender(**arguments)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("my task", "`task` must be a non-empty string of .* Received: task='my task'"),
        ("mmoe", r"must give each layer a name of its own.* Received: repeated=\['mmoe'\]"),
    ],
)
def test_a_bad_task_name_fails_when_the_tuner_is_made(tmp_path, task, message):
    hypermodel = tuning.HyperMMoERecommender(FEATURES, {task: "binary"})
    with pytest.raises(ValueError, match=message):
        keras_tuner.RandomSearch(hypermodel, objective="val_loss", directory=tmp_path)


WITHOUT_KERAS_TUNER = """
import sys
import keras_moe.tuning as tuning
from keras_moe.flops import active_flops
assert "keras_tuner" not in sys.modules
sys.modules["keras_tuner"] = None  # as if it were not installed
assert "HyperViTMoE" in dir(tuning)
cost = tuning.ActiveCost("val_loss", "min")
for needs_it in (lambda: tuning.HyperViTMoE, lambda: tuning.HyperMMoERecommender,
                 lambda: cost.objective):
    try:
        needs_it()
    except ImportError as error:
        assert 'pip install ".[tuner]"' in str(error), error
    else:
        raise AssertionError("no error")
assert not hasattr(tuning, "HyperEverything")
"""


def test_keras_tuner_is_imported_when_needed_only():
    result = subprocess.run(
        [sys.executable, "-c", WITHOUT_KERAS_TUNER],
        env=os.environ.copy(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr
