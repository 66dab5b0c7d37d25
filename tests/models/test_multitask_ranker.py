"""The ranker predicts what NumPy does, trains compiled, saves, and says what is wrong."""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

import keras_moe
from keras_moe.models import HistoryMean, features, multitask_ranker, task_gates
from tests import helpers

pytestmark = pytest.mark.one_backend("made of layers that are tested everywhere")

FEATURES = [
    features.Categorical("user", 7, dim=4),
    features.Categorical("movie", 9, dim=4),
    features.History("recent", length=5, of="movie"),
    features.Categorical("weekday", 7, dim=2, regularized=False),
    features.MultiHot("genres", 3, dim=4),
    features.Numeric("scalars", 2, mean=[1.0, -2.0], variance=[4.0, 0.0]),
    features.Numeric("raw"),
]
INTERACTIONS = [("user", "movie"), ("recent", "movie"), ("genres", "movie")]
TASKS = {"click": "binary", "like": "binary", "stars": "regression"}
SMALL = {"shared_units": 8, "num_experts": 3, "expert_units": 6, "tower_units": 5, "seed": 1}


def ranker(**arguments):
    arguments = {"interactions": INTERACTIONS, **SMALL, **arguments}
    return multitask_ranker(arguments.pop("features", FEATURES), TASKS, **arguments)


def examples(count=12, seed=0):
    rng = np.random.default_rng(seed)
    recent = rng.integers(1, 9, (count, 5)).astype("int32")
    recent[:, 3:] = 0
    recent[0] = 0  # somebody new
    return {
        "user": rng.integers(0, 7, count).astype("int32"),
        "movie": rng.integers(1, 9, count).astype("int32"),
        "recent": recent,
        "weekday": rng.integers(0, 7, count).astype("int32"),
        "genres": rng.integers(0, 2, (count, 3)).astype("float32"),
        "scalars": rng.normal(size=(count, 2)).astype("float32"),
        "raw": rng.normal(size=(count, 1)).astype("float32"),
    }


def labels(batch):
    like = batch["genres"][:, :1]
    return {"click": batch["genres"][:, 1:2], "like": like, "stars": 1 + 2 * like + batch["raw"]}


def weights_of(model):
    return {v.path: ops.convert_to_numpy(v).astype("float64") for v in model.trainable_variables}


def num_trainable(model):
    return sum(int(np.prod(v.shape)) for v in model.trainable_variables)


# === Values ===


def expected_features(batch, weights):
    """The concatenated vectors, with a loop over the examples' histories."""
    movie_table = weights["movie_embedding/embeddings"]
    recent = [
        np.mean([movie_table[i] for i in row if i], axis=0) if row.any() else np.zeros(4)
        for row in batch["recent"]
    ]
    user = weights["user_embedding/embeddings"][batch["user"]]
    movie = movie_table[batch["movie"]]
    genres = batch["genres"] @ weights["genres_embedding/kernel"]
    scalars = (batch["scalars"] - [1.0, -2.0]) / [2.0, 1.0]  # the second was constant in training
    weekday = weights["weekday_embedding/embeddings"][batch["weekday"]]
    vectors = [user, movie, np.array(recent), weekday, genres, scalars, batch["raw"]]
    return np.concatenate([*vectors, user * movie, recent * movie, genres * movie], axis=1)


def hidden(x, weights, name):
    """All layers of that name, in turn, with ReLU."""
    layer, index = name, 0
    while f"{layer}/kernel" in weights:
        x = np.maximum(x @ weights[f"{layer}/kernel"] + weights[f"{layer}/bias"], 0)
        index += 1
        layer = f"{name}_{index}"
    return x


def expected_gates(x, weights):
    logits = np.einsum("nd,tde->nte", x, weights["mmoe/gates/kernel"])
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def expected_experts(x, weights):
    outputs = []
    for expert in range(3):
        y, layer = x, 0
        while f"mmoe/experts/kernel_{layer}" in weights:
            kernel = weights[f"mmoe/experts/kernel_{layer}"][expert]
            y = np.maximum(y @ kernel + weights[f"mmoe/experts/bias_{layer}"][expert], 0)
            layer += 1
        outputs.append(y)
    return np.stack(outputs, axis=1)


def expected_predictions(batch, weights):
    x = hidden(expected_features(batch, weights), weights, "shared_hidden")
    if "mmoe/gates/kernel" in weights:
        gates, experts = expected_gates(x, weights), expected_experts(x, weights)
        mixed = np.einsum("nte,neh->tnh", gates, experts)
    else:
        mixed = [hidden(x, weights, "shared_bottom")] * len(TASKS)
    predictions = {}
    for (task, kind), y in zip(TASKS.items(), mixed, strict=True):
        y = hidden(y, weights, f"{task}_tower")
        y = y @ weights[f"{task}/kernel"] + weights[f"{task}/bias"]
        predictions[task] = 1 / (1 + np.exp(-y)) if kind == "binary" else y
    return predictions


@pytest.mark.every_backend
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"shared_units": (), "expert_units": [6, 4], "tower_units": [5, 3]},
        {"shared_units": [8, 6], "tower_units": (), "trunk": "shared_bottom"},
    ],
)
def test_predictions_are_those_of_numpy(arguments):
    model = ranker(**arguments)
    helpers.randomize_weights(model, seed=1, size=0.5)
    batch = examples()
    expected = expected_predictions(batch, weights_of(model))
    assert all(values.std() > 0.01 for values in expected.values()), "they must tell apart"
    helpers.assert_all_close(model.predict(batch, verbose=0), expected)


def test_gates_are_those_of_numpy_and_follow_training():
    model = ranker()
    gates = task_gates(model)
    helpers.randomize_weights(model)
    batch, weights = examples(), weights_of(model)
    x = hidden(expected_features(batch, weights), weights, "shared_hidden")
    actual = gates.predict(batch, verbose=0)
    assert actual.shape == (12, len(TASKS), 3)
    helpers.assert_close(actual, expected_gates(x, weights), "gates")


def test_smallest_ranker():
    model = multitask_ranker(
        [features.Numeric("x", 3)], {"y": "regression"}, shared_units=(), tower_units=()
    )
    assert {name: out.shape for name, out in model.output.items()} == {"y": (None, 1)}
    assert model.predict({"x": np.ones((2, 3))}, verbose=0)["y"].shape == (2, 1)


# === Histories ===


@pytest.fixture
def history():
    """A model from ids to the mean of their vectors, with NaN in the row of the padding."""
    ids = keras.Input((4,), dtype="int32")
    table = keras.layers.Embedding(5, 3)
    model = keras.Model(ids, HistoryMean()([table(ids), ids]))
    values = np.arange(15, dtype="float32").reshape(5, 3)
    values[0] = np.nan
    table.embeddings.assign(values)
    return model, values


def test_padding_of_a_history_contributes_nothing(history):
    model, values = history
    rows = np.array([[1, 2, 4, 0], [0, 3, 0, 0], [0, 0, 0, 0]], "int32")
    expected = [values[[1, 2, 4]].mean(0), values[3], np.zeros(3)]
    np.testing.assert_allclose(model.predict(rows, verbose=0), expected, rtol=1e-6)


def test_an_empty_history_has_finite_gradients_and_moves_no_vector(history):
    model, values = history
    optimizer = keras.optimizers.SGD(1.0)
    model.compile(optimizer, "mse", jit_compile=keras.backend.backend() != "torch")
    values[0] = 0.0
    model.trainable_variables[0].assign(values)
    model.fit(np.zeros((2, 4), "int32"), np.ones((2, 3)), verbose=0)
    np.testing.assert_array_equal(model.get_weights()[0], values)
    model.fit(np.array([[3, 0, 0, 0]] * 2, "int32"), np.ones((2, 3)), verbose=0)
    moved = (model.get_weights()[0] != values).any(axis=1)
    np.testing.assert_array_equal(moved, [False, False, False, True, False])


def test_long_histories_in_bfloat16_add_up_in_float32():
    layer = HistoryMean(dtype="bfloat16")
    vectors = ops.ones((1, 1000, 1), "bfloat16")
    mean = layer([vectors, np.ones((1, 1000), "int32")])
    assert float(ops.convert_to_numpy(ops.cast(mean, "float32"))[0, 0]) == 1.0


# === Training, seeds, precision ===


@pytest.mark.every_backend
def test_compiled_fit_lowers_every_loss():
    batch = examples(64)
    widths = {"shared_units": 32, "expert_units": 16, "tower_units": 16}
    model = ranker(dropout=0.1, gate_dropout=0.1, **widths)
    losses = {"click": "binary_crossentropy", "like": "binary_crossentropy", "stars": "mse"}
    use_xla = keras.backend.backend() != "torch"  # torch.compile takes a minute
    model.compile(keras.optimizers.Adam(0.02), losses, jit_compile=use_xla)
    history = model.fit(batch, labels(batch), batch_size=16, epochs=25, verbose=0).history
    for task in TASKS:
        first, *_, last = history[f"{task}_loss"]
        assert last < 0.9 * first, (task, first, last)


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras_moe.layers.CGC(6, list(TASKS), 2, 1, name="trunk"),
        lambda: keras_moe.layers.PLE(6, list(TASKS), 1, 1, name="trunk"),
        lambda: keras_moe.layers.AdaTT([[8], [6]], list(TASKS), name="trunk"),
    ],
)
def test_other_structures_are_trunks(make, tmp_path):
    keras.utils.set_random_seed(0)
    model = multitask_ranker(FEATURES, TASKS, trunk=make(), shared_units=8, tower_units=5, seed=1)
    model.compile(keras.optimizers.Adam(0.02), loss="mse")
    batch = examples(96)
    losses = model.fit(batch, labels(batch), epochs=6, verbose=0).history["loss"]
    assert losses[-1] < 0.8 * losses[0]
    model.save(tmp_path / "ranker.keras")
    loaded = keras.models.load_model(tmp_path / "ranker.keras")
    for task, predicted in model.predict(batch, verbose=0).items():
        np.testing.assert_allclose(loaded.predict(batch, verbose=0)[task], predicted, rtol=1e-5)


def test_a_seed_fixes_the_weights_and_leaves_the_global_one_alone():
    first, again, other = (weights_of(ranker(seed=seed)) for seed in (1, 1, 2))
    for path, values in first.items():
        np.testing.assert_array_equal(again[path], values, err_msg=path)
        assert "bias" in path or (other[path] != values).any(), path
    drawn = []
    for _ in range(2):
        keras.utils.set_random_seed(3)
        ranker(seed=len(drawn))
        drawn.append(ops.convert_to_numpy(keras.random.normal((4,))))
    np.testing.assert_array_equal(*drawn)


def test_layers_of_one_seed_differ_and_the_trunks_share_them():
    mmoe, bottom = (
        weights_of(multitask_ranker(FEATURES, TASKS, trunk=trunk, shared_units=[8, 8], seed=1))
        for trunk in ("mmoe", "shared_bottom")
    )
    common = [path for path in mmoe if path in bottom and "_tower/" not in path]
    assert len(common) > 6
    for path in common:
        np.testing.assert_array_equal(mmoe[path], bottom[path], err_msg=path)
    towers = [mmoe[f"{task}_tower/kernel"] for task in TASKS]
    assert (towers[0] != towers[1]).all() and (towers[1] != towers[2]).all()
    gates = mmoe["mmoe/gates/kernel"]
    assert (gates[0] != gates[1]).all()


def test_no_seed_follows_keras():
    drawn = []
    for seed in (5, 5, 6):
        keras.utils.set_random_seed(seed)
        drawn.append(weights_of(ranker(seed=None))["user_embedding/embeddings"])
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert (drawn[0] != drawn[2]).any()


def test_only_regularized_features_are_penalised_and_dropped():
    model = ranker(embedding_l2=0.5, dropout=0.5)
    helpers.randomize_weights(model)
    weights = weights_of(model)
    tables = [weights[f"{name}_embedding/embeddings"] for name in ("user", "movie")]
    penalty = sum(float(ops.convert_to_numpy(loss)) for loss in model.losses)
    assert penalty == pytest.approx(0.5 * sum((table**2).sum() for table in tables), rel=1e-5)

    seen = keras.Model(model.input, model.get_layer("features").output)
    batch = examples(40)
    in_training = ops.convert_to_numpy(seen(batch, training=True))
    is_dropped = (in_training == 0) & (expected_features(batch, weights) != 0)
    # user 4, movie 4, recent 4, weekday 2, genres 4, scalars 2, raw 1, products 12
    assert 0.3 < is_dropped[:, :12].mean() < 0.7
    assert not is_dropped[:, 12:21].any()
    assert is_dropped[:, 21:].any()


def test_no_penalty_where_none_is_asked_for():
    assert ranker(embedding_l2=0.0).losses == []


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_predicts_float32(policy):
    keras.config.set_dtype_policy(policy)
    described = [*FEATURES, features.Numeric("time", mean=1.7e9, variance=1e14)]
    model = ranker(features=described)
    batch = {**examples(), "time": np.full((12, 1), 1.71e9, "float32")}
    for task, prediction in model.predict(batch, verbose=0).items():
        assert prediction.dtype == "float32", task
        assert np.isfinite(prediction).all(), task


def test_initial_predictions():
    model = ranker(initial_predictions={"click": 0.02, "stars": 3.5})
    for task in TASKS:
        kernel = model.get_layer(task).kernel
        kernel.assign(np.zeros(kernel.shape))
    predictions = model.predict(examples(2), verbose=0)
    for task, expected in {"click": 0.02, "like": 0.5, "stars": 3.5}.items():
        np.testing.assert_allclose(predictions[task], expected, rtol=1e-5, err_msg=task)


# === Sizes ===


@pytest.mark.parametrize(
    ("arguments", "tolerance"),
    [
        ({}, 0.01),
        ({"num_experts": 1, "expert_units": 1, "tower_units": 1}, 0.05),
        ({"num_experts": 8, "expert_units": 16}, 0.01),
        ({"shared_units": (), "tower_units": ()}, 0.01),
        ({"expert_units": [32, 16], "shared_units": [16, 16]}, 0.01),
        ({"expert_units": [8, 24, 8], "num_experts": 6}, 0.02),
    ],
)
def test_a_shared_bottom_has_as_many_parameters(arguments, tolerance):
    with keras.StatelessScope():  # weights with shapes and without values
        sizes = [
            num_trainable(multitask_ranker(FEATURES[3:], TASKS, trunk=trunk, **arguments))
            for trunk in ("mmoe", "shared_bottom")
        ]
    assert sizes[1] == pytest.approx(sizes[0], rel=tolerance)


# === Files ===

LOADER = """
import sys
import keras, numpy as np
before = set(sys.modules)  # Keras on torch imports jax and matplotlib where they are installed
import keras_moe
model = keras.saving.load_model("ranker.keras", compile=False)
with np.load("batch.npz") as batch:
    np.savez("predictions.npz", **model.predict(dict(batch), verbose=0))
strangers = {"jax", "torch", "tf_keras", "tensorflow_recommenders", "keras_tuner", "matplotlib"}
print(sorted(strangers & (set(sys.modules) - before)))
"""


def test_a_fresh_process_on_another_backend_predicts_the_same(tmp_path):
    """With nothing imported that it does not need."""
    model, batch = ranker(), examples()
    helpers.randomize_weights(model)
    model.save(tmp_path / "ranker.keras")
    np.savez(tmp_path / "batch.npz", **batch)
    other = {"jax": "torch", "torch": "tensorflow", "tensorflow": "jax"}
    environment = {
        **os.environ,
        "KERAS_BACKEND": other[keras.backend.backend()],
        "PYTHONPATH": str(Path(keras_moe.__file__).parents[1]),
    }
    process = subprocess.run(
        [sys.executable, "-c", LOADER],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    assert process.stdout.strip() == "[]"
    with np.load(tmp_path / "predictions.npz") as predictions:
        for task, expected in model.predict(batch, verbose=0).items():
            np.testing.assert_allclose(predictions[task], expected, atol=2e-5, err_msg=task)


def test_a_loaded_ranker_shows_its_gates(tmp_path):
    model = ranker(name="movies")
    model.save(tmp_path / "ranker.keras")
    loaded = keras.saving.load_model(tmp_path / "ranker.keras")
    batch = examples()
    expected = task_gates(model).predict(batch, verbose=0)
    np.testing.assert_array_equal(task_gates(loaded).predict(batch, verbose=0), expected)
    assert loaded.name == "movies"


# === Features of one's own ===


@dataclasses.dataclass(frozen=True)
class Vector(features.Feature):
    """A vector that another model made, such as a text embedding."""

    size: int

    def input(self):
        return keras.Input((self.size,), name=self.name)

    def encode(self, inputs, tables, seed):
        return keras.layers.UnitNormalization(name=f"{self.name}_unit")(inputs)


def test_sizes_may_be_integers_of_numpy():
    numbers = np.array([7, 3, 2, 5])
    model = multitask_ranker(
        [
            features.Categorical("movie", numbers.max(), dim=numbers[1]),
            features.History("recent", length=numbers[2], of="movie"),
            features.MultiHot("genres", numbers[3], dim=numbers[1]),
            features.Numeric("age", numbers[2]),
        ],
        {"watched": "binary"},
    )
    assert model.get_layer("movie_embedding").input_dim == 7


def test_a_feature_of_ones_own():
    model = ranker(features=[*FEATURES, Vector("title", 4)], interactions=[("title", "movie")])
    batch = {**examples(), "title": np.ones((12, 4), "float32")}
    assert model.get_layer("title_unit") is not None
    assert model.predict(batch, verbose=0)["click"].shape == (12, 1)


# === Names ===

USER = features.Categorical("user", 7)
REFUSED = ["", "my task", "tâche", "任务", "a.b", "a:b", "a/b", "a\n", "a,b", 3, None]
TAKEN_BY_ALL = ["Click-2", "9", "_a", "-a", "a" * 200]


@pytest.mark.parametrize("name", REFUSED)
def test_names_that_a_backend_refuses_are_refused(name):
    expected = "must be a non-empty string of letters from a to z, digits, `_` and `-`."
    with pytest.raises(
        ValueError, match=rf"`task` {expected}.* Received: task={re.escape(repr(name))}"
    ):
        multitask_ranker([USER], {name: "binary"})
    with pytest.raises(
        ValueError, match=rf"`name` {expected}.* Received: name={re.escape(repr(name))}"
    ):
        features.Numeric(name)


@pytest.mark.every_backend
def test_names_that_every_backend_takes(tmp_path):
    """All in one model: a name that is refused is named by what refuses it."""
    described, x = [], {}
    for name in TAKEN_BY_ALL:
        described += [features.Categorical(f"{name}-id", 7), features.Numeric(f"{name}-number")]
        x |= {f"{name}-id": np.arange(4), f"{name}-number": np.ones((4, 1), "float32")}
    model = multitask_ranker(described, dict.fromkeys(TAKEN_BY_ALL, "binary"), seed=0)
    model.compile("sgd", dict.fromkeys(TAKEN_BY_ALL, "binary_crossentropy"))
    y = dict.fromkeys(TAKEN_BY_ALL, np.ones((4, 1)))
    history = model.fit(x, y, verbose=0).history
    model.save(tmp_path / "ranker.keras")
    loaded = keras.saving.load_model(tmp_path / "ranker.keras")
    again, outputs = loaded.predict(x, verbose=0), model.predict(x, verbose=0)
    for name in TAKEN_BY_ALL:
        assert f"{name}_loss" in history
        np.testing.assert_array_equal(again[name], outputs[name])


@pytest.mark.parametrize(
    ("described", "tasks", "arguments", "repeated"),
    [
        ([USER], ["mmoe"], {}, "mmoe"),
        ([USER], ["shared_hidden"], {}, "shared_hidden"),
        ([USER], ["embedding_dropout"], {}, "embedding_dropout"),
        ([USER], ["user_embedding"], {}, "user_embedding"),
        ([USER], ["c", "c_tower"], {}, "c_tower"),
        ([USER], ["c", "c_tower_1"], {"tower_units": [4, 4]}, "c_tower_1"),
        ([USER], ["shared_bottom"], {"trunk": "shared_bottom"}, "shared_bottom"),
        ([USER, features.Numeric("user_embedding")], ["c"], {}, "user_embedding"),
        ([USER, features.Numeric("features")], ["c"], {}, "features"),
        ([USER, features.Numeric("mmoe")], ["c"], {}, "mmoe"),
        (
            [USER, features.Categorical("movie", 7)],
            ["c"],
            {"interactions": [("user", "movie"), ("user", "movie")]},
            "user_times_movie",
        ),
    ],
)
def test_names_that_give_two_layers_one_name_are_refused(described, tasks, arguments, repeated):
    message = rf"must give each layer a name of its own.* Received: repeated=\['{repeated}'\]"
    with pytest.raises(ValueError, match=message):
        multitask_ranker(described, dict.fromkeys(tasks, "binary"), **arguments)


def test_names_of_layers_that_a_model_has_not_are_free():
    for task, arguments in (
        ("mmoe", {"trunk": "shared_bottom"}),
        ("shared_hidden", {"shared_units": ()}),
        ("shared_bottom", {}),
        ("user_mean", {}),
    ):
        model = multitask_ranker([USER], {task: "binary"}, **arguments)
        assert list(model.output) == [task]


# === Bad input ===

BAD = [
    (lambda: features.Categorical("", 7), "`name` must be a non-empty string .* name=''"),
    (lambda: features.Categorical("user", 0), "`size` must be a positive .* Received: size=0"),
    (lambda: features.Categorical("user", 7, dim=-1), "`dim` must be a positive integer"),
    (lambda: features.History("recent", 0, of="movie"), "`length` must be a positive integer"),
    (lambda: features.MultiHot("genres", 2.5), "`size` must be .* Received: size=2.5"),
    (lambda: features.Numeric("x", 2, mean=0.0), "`mean` and `variance` must be given both or"),
    (
        lambda: features.Numeric("x", 2, mean=[0.0] * 3, variance=1.0),
        r"`mean` must be finite numbers, one or size=2. Received: mean=\[0.0, 0.0, 0.0\]",
    ),
    (
        lambda: features.Numeric("x", 1, mean=0.0, variance=-1.0),
        "`variance` must be finite numbers of at least 0, .* Received: variance=-1.0",
    ),
    (
        lambda: features.Numeric("x", 1, mean=float("nan"), variance=1.0),
        "`mean` must be finite numbers",
    ),
    (lambda: ranker(features=[]), r"`features` must be a sequence of .* features=\[\]"),
    (lambda: ranker(features=["user"]), r"`features` must be .* Received: features=\['user'\]"),
    (lambda: ranker(features=USER), "`features` must be a sequence of"),
    (
        lambda: ranker(features=[USER, USER]),
        r"`features` must have distinct names. Received: names=\['user', 'user'\]",
    ),
    (
        lambda: ranker(features=[USER, features.History("recent", 3, of="movie")]),
        r"`of` must name a `Categorical` feature, of \['user'\]. .* name='recent', of='movie'",
    ),
    (
        lambda: multitask_ranker([USER], {"user": "binary"}),
        r"`tasks` and `features` must have different names. Received: in_both=\['user'\]",
    ),
    (
        lambda: multitask_ranker([USER], {"click": "logit"}),
        r"of one of the kinds \['binary', 'regression'\]. Received: click='logit'",
    ),
    (lambda: multitask_ranker([USER], {}), "`tasks` must be a dict of names to kinds"),
    (lambda: multitask_ranker([USER], ["click"]), r"`tasks` must be .* tasks=\['click'\]"),
    (
        lambda: ranker(trunk="tree"),
        r"`trunk` must be one of \['mmoe', 'shared_bottom'\]. Received: trunk='tree'",
    ),
    (
        lambda: multitask_ranker(
            FEATURES, TASKS, trunk=keras_moe.layers.CGC(6, list(TASKS)), num_experts=3
        ),
        "`num_experts` must be left out where `trunk` is a layer.*num_experts=3",
    ),
    (
        lambda: multitask_ranker(FEATURES, TASKS, trunk=keras_moe.layers.CGC(6, ["a", "b"])),
        r"`trunk` must give a dict of vectors by task.*outputs=\['a', 'b'\]",
    ),
    (lambda: ranker(num_experts=0), "`num_experts` must be a positive .* num_experts=0"),
    (
        lambda: ranker(num_experts=0, trunk="shared_bottom"),
        "`num_experts` must be a positive integer",
    ),
    (lambda: ranker(expert_units=[]), "`expert_units` must name at least one layer width"),
    (lambda: ranker(shared_units=[8, 0]), "`shared_units` must be a positive integer"),
    (lambda: ranker(tower_units=-1), "`tower_units` must be a positive integer"),
    (lambda: ranker(dropout=1.0), r"`dropout` must be a number in \[0, 1\)"),
    (lambda: ranker(gate_dropout=-0.1), r"`gate_dropout` must be a number in \[0, 1\)"),
    (lambda: ranker(embedding_l2=-1), "`embedding_l2` must be a number of at least 0"),
    (lambda: ranker(seed="a"), "`seed` must be an integer or None"),
    (
        lambda: ranker(interactions=[("user", "film")]),
        r"`interactions` must be pairs of names of features, .* interaction=\('user', 'film'\)",
    ),
    (lambda: ranker(interactions=["um"]), "`interactions` must be pairs .* interaction='um'"),
    (lambda: ranker(interactions=[("user",)]), "`interactions` must be pairs of names"),
    (
        lambda: ranker(interactions=[("user", "weekday")]),
        r"of equal width. Received: interaction=\('user', 'weekday'\), widths=\(4, 2\)",
    ),
    (
        lambda: ranker(initial_predictions={"watch": 1.0}),
        "`initial_predictions` must be a dict of tasks, .* initial_predictions={'watch': 1.0}",
    ),
    (
        lambda: ranker(initial_predictions={"click": 1.0}),
        "of binary tasks must be probabilities between 0 and 1. Received: click=1.0",
    ),
    (
        lambda: ranker(initial_predictions={"stars": float("inf")}),
        "of regression tasks must be finite numbers. Received: stars=inf",
    ),
    (
        lambda: task_gates(ranker(trunk="shared_bottom")),
        r"`model` must have an `MMoE`, .* Received: model='shared_bottom', mixtures=\[\]",
    ),
    (
        lambda: HistoryMean()([np.zeros((2, 3)), np.zeros((2, 3))]),
        r"`HistoryMean` expects \[\(batch, n, d\), \(batch, n\)\]",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
