"""CGC, PLE and AdaTT: the papers' equations, and what every layer must do."""

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import layers, routers
from keras_moe.inspection.mixtures import named_layers
from tests import helpers
from tests.oracle import task_levels

WIDTH, ROWS = 5, 7
X = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype("float32")

STACKS = {
    "ple": (layers.PLE, {"num_task_experts": 2, "num_shared_experts": 1, "num_levels": 3}),
    "ple, by level": (layers.PLE, {"expert_units": [[6, 4], [3]], "num_shared_experts": 2}),
    "ple, none shared": (layers.PLE, {"num_task_experts": 2, "num_shared_experts": 0}),
    "adatt-sp": (layers.AdaTT, {}),
    "adatt-sp, two each": (layers.AdaTT, {"num_task_experts": 2, "expert_units": [[6], [4]]}),
    "adatt, one shared": (layers.AdaTT, {"num_shared_experts": 1, "num_levels": 3}),
    "adatt, shared": (layers.AdaTT, {"num_task_experts": 2, "num_shared_experts": 3}),
    "adatt, one of two shared": (layers.AdaTT, {"num_task_experts": 1, "num_shared_experts": 2}),
}


def make(case, **more):
    kind, arguments = STACKS[case]
    layer = kind(
        **{"expert_units": [6, 4], "tasks": ["a", "b", "c"], "seed": 1, **arguments}, **more
    )
    layer.build((None, WIDTH))
    return layer


def levels_of(layer):
    weights = helpers.weights_of(layer)
    return [
        {
            path.removeprefix(part + "/"): value
            for path, value in weights.items()
            if path.startswith(part + "/")
        }
        for part in layer.parts
    ]


@pytest.mark.parametrize("name", STACKS)
def test_stacks_are_the_papers(name):
    layer = make(name)
    helpers.randomize_weights(layer)
    outputs, _ = helpers.call(layer, X)
    expected = task_levels.stack(
        X,
        levels_of(layer),
        tasks=3,
        own=layer.num_task_experts,
        shared=layer.num_shared_experts,
        is_adatt=isinstance(layer, layers.AdaTT),
    )
    assert list(outputs) == ["a", "b", "c"] and len(expected) == 3
    for output, wanted in zip(outputs.values(), expected, strict=True):
        helpers.assert_close(output, wanted, name, tolerance=1e-5)


@pytest.mark.parametrize("shared_output", [False, True])
def test_cgc_is_the_papers(shared_output):
    layer = layers.CGC([6, 4], ["a", "b"], 2, 1, shared_output=shared_output)
    layer.build((None, WIDTH))
    helpers.randomize_weights(layer)
    outputs, _ = helpers.call(layer, X)
    expected = task_levels.level(
        [X.astype("float64")] * 3,
        helpers.weights_of(layer),
        tasks=2,
        own=2,
        shared=1,
        gates=2 + shared_output,
        is_adatt=False,
    )
    assert list(outputs) == ["a", "b", "shared"][: 2 + shared_output]
    for output, wanted in zip(outputs.values(), expected, strict=True):
        helpers.assert_close(output, wanted, "cgc", tolerance=1e-5)


def swish_expert(units):
    """As HoME has it: ReLU leaves most outputs at 0."""
    return keras.Sequential(
        [
            keras.layers.Dense(units),
            keras.layers.BatchNormalization(),
            keras.layers.Activation("swish"),
        ]
    )


@pytest.mark.parametrize(
    "make",
    [
        lambda: layers.MMoE(3, None, ["a", "b"], experts=swish_expert(6)),
        lambda: layers.CGC(None, ["a", "b"], experts=swish_expert(6)),
        lambda: layers.PLE(None, ["a", "b"], num_levels=2, experts=swish_expert(6)),
        lambda: layers.AdaTT(None, ["a", "b"], num_levels=2, experts=keras.layers.Dense(6, "tanh")),
        lambda: layers.PLE([[7], [6]], ["a", "b"], experts="glu", activation="silu"),
    ],
)
def test_experts_may_be_keras_layers(make, tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((WIDTH,))
    outputs = make()(inputs)
    assert {task: output.shape for task, output in outputs.items()} == {
        "a": (None, 6),
        "b": (None, 6),
    }
    model = keras.Model(inputs, {t: keras.layers.Dense(1, name=t)(y) for t, y in outputs.items()})
    model.compile(keras.optimizers.Adam(0.03), "mse")
    x = np.tile(X, (8, 1))
    targets = {"a": x[:, :1], "b": x[:, 1:2]}
    losses = model.fit(x, targets, epochs=8, batch_size=28, verbose=0).history["loss"]
    assert losses[-1] < 0.9 * losses[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for task in "ab":
        np.testing.assert_allclose(
            loaded.predict(x, verbose=0)[task],
            model.predict(x, verbose=0)[task],
            rtol=1e-4,
            atol=1e-5,
        )


def test_an_mmoe_of_keras_layers_is_their_sum():
    experts = [keras.layers.Dense(4, "tanh") for _ in range(3)]
    layer = layers.MMoE(3, None, 2, experts=experts)
    outputs, routing = layer(X, return_routing=True)
    given = np.stack([keras.ops.convert_to_numpy(expert(X)) for expert in experts], axis=1)
    weights = keras.ops.convert_to_numpy(routing.weights)
    for task, output in enumerate(outputs):
        expected = (weights[:, task, :, None] * given).sum(1)
        helpers.assert_close(keras.ops.convert_to_numpy(output), expected, "sum")


def test_a_task_gives_other_tasks_experts_no_gradient():
    layer = layers.CGC([6, 4], 2, 2, 1)
    layer.build((None, WIDTH))
    helpers.randomize_weights(layer)
    cotangents = [np.ones((ROWS, 4), "float32"), np.zeros((ROWS, 4), "float32")]
    _, _, gradients = helpers.values_and_gradients(layer, X, cotangents)
    reached = np.abs(gradients["experts/kernel_1"]).sum(axis=(1, 2)) > 0
    np.testing.assert_array_equal(reached, [True, True, False, False, True])
    gate = np.abs(gradients["gates/kernel"])
    assert (gate[0][:, [0, 1, 4]] > 0).all() and not gate[0][:, [2, 3]].any() and not gate[1].any()


@pytest.mark.parametrize("access", [{"a": [0, 2], "b": [1, 2]}, [[1, 0, 1], [0, 1, 1]]])
def test_access_is_that_of_cgc(access):
    layer = layers.MMoE(3, [6, 4], ["a", "b"], access=access)
    same = layers.CGC([6, 4], ["a", "b"])
    for each in (layer, same):
        each.build((None, WIDTH))
    helpers.randomize_weights(layer)
    same.set_weights(layer.get_weights())
    (found, routing), _ = helpers.call(layer, X, return_routing=True)
    expected, _ = helpers.call(same, X)
    for task in "ab":
        np.testing.assert_array_equal(found[task], expected[task])
    assert not routing.weights[:, 0, 1].any() and not routing.weights[:, 1, 0].any()
    np.testing.assert_allclose(routing.weights.sum(-1), 1.0, rtol=1e-6)


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: layers.MMoE(3, 4, 2, access=[[1, 0, 0], [0, 0, 0]]), "task 1 has none"),
        (lambda: layers.MMoE(3, 4, 2, access=[[1, 0, 0], [0, 1, 0]]), "nobody takes expert 2"),
        (lambda: layers.MMoE(3, 4, 2, access=[[1, 1, 1]]), r"\(tasks, experts\) = \(2, 3\)"),
        (lambda: layers.MMoE(3, 4, 2, access=[[1, 2, 0], [1, 1, 1]]), "must be bools"),
        (lambda: layers.MMoE(3, 4, 2, access={"a": [0]}), "a dict of the tasks, 2, or a mask"),
        (lambda: layers.MMoE(3, 4, ["a", "b"], access={"a": [0, 1, 2]}), "a dict of the tasks"),
        (
            lambda: layers.MMoE(3, 4, ["a", "b"], access={"a": [3], "b": [0]}),
            r"`access\['a'\]` must be numbers of experts, from 0 to 2",
        ),
        (lambda: layers.CGC(4, 2, 0), "`num_task_experts` must be a positive integer"),
        (lambda: layers.CGC(4, 2, 1, -1), "`num_shared_experts` must be"),
        (lambda: layers.CGC(4, 2, num_experts=4), "has no use for `num_experts`"),
        (lambda: layers.CGC(4, ["a", "shared"], shared_output=True), "must not hold 'shared'"),
        (lambda: layers.PLE([[4], [4]], 2, num_levels=3), "or num_levels=3 of them"),
        (lambda: layers.PLE(4, 2, num_levels=0), "`num_levels` must be a positive integer"),
        (lambda: layers.PLE(4, 2, gate=routers.SoftmaxGate(3, 2)), "a function that makes one"),
        (lambda: layers.AdaTT(4, 2, gate="top_k", gate_use_bias=True), "`gate_use_bias` must be"),
        (lambda: layers.PLE(4, 2, gate="soft"), "`gate` must be one of"),
        (
            lambda: layers.MMoE(3, 4, 2, experts=keras.layers.Dense(4)),
            "`expert_units` must be left out where `experts` are layers",
        ),
        (
            lambda: layers.MMoE(3, None, 2, experts=keras.layers.Dense(4), dropout=0.1),
            "`dropout` must be left out where `experts` are layers",
        ),
        (lambda: layers.MMoE(3, None, 2), "`expert_units` must be a positive integer"),
        (lambda: layers.MMoE(3, 4, 2, experts="swish"), "`experts` must be one of"),
        (lambda: layers.AdaTT(4, 0), "`tasks` must be a positive integer"),
        (lambda: layers.PLE(4, 2, balance_weight=0.1), "balance_weight"),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize("name", ["ple", "adatt, shared"])
def test_padding_is_zero_and_gives_nothing(name):
    layer = make(name)
    helpers.randomize_weights(layer)
    x = np.stack([X, X + 1.0])
    mask = np.arange(ROWS) < np.array([[4], [ROWS]])
    spoiled = np.where(mask[..., None], x, np.nan).astype("float32")
    found, _ = helpers.call(layer, spoiled, mask=mask)
    expected, _ = helpers.call(layer, x)
    for task in "abc":
        assert not found[task][~mask].any()
        np.testing.assert_allclose(found[task][mask], expected[task][mask], rtol=1e-5, atol=1e-6)


@keras.saving.register_keras_serializable(package="tests")
def cold_gate(num_experts, num_tasks, access):
    return routers.SoftmaxGate(num_experts, num_tasks, access=access, temperature=0.5)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("ple", {"gate": "sigmoid", "gate_dropout": 0.2, "gate_units": [4]}),
        ("ple", {"gate": cold_gate}),
        ("adatt, shared", {"activation": "tanh", "kernel_regularizer": "l2"}),
        ("adatt-sp, two each", {"gate": "top_k"}),
    ],
)
def test_a_model_trains_and_is_loaded(name, arguments, tmp_path):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((WIDTH,))
    outputs = make(name, name="stack", **arguments)(inputs)
    model = keras.Model(inputs, {t: keras.layers.Dense(1, name=t)(y) for t, y in outputs.items()})
    model.compile(keras.optimizers.Adam(0.02), "mse")
    x = np.tile(X, (8, 1))
    targets = {task: x[:, :1] * (1 + i) for i, task in enumerate("abc")}
    history = model.fit(x, targets, epochs=8, batch_size=28, verbose=0).history["loss"]
    assert history[-1] < 0.9 * history[0]
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for task in "abc":
        np.testing.assert_allclose(
            loaded.predict(x, verbose=0)[task], model.predict(x, verbose=0)[task], rtol=1e-5
        )


@pytest.mark.one_backend("names are the same on all")
def test_levels_are_seen_by_their_names():
    model = keras.Sequential([keras.Input((WIDTH,)), make("ple", name="ple")])
    names = [name for name, _ in named_layers(model)]
    assert names == ["level_0", "level_1", "level_2"]
    layer = model.layers[0]
    layer(X, training=True)
    counts = layer.level_0.running_counts()
    assert counts["decisions"] == ROWS and counts["importance"].shape == (4, 7)
    np.testing.assert_allclose(counts["importance"].sum(-1), ROWS, rtol=1e-5)
    assert layer.level_0.tasks == ("a", "b", "c", "shared")
    assert not counts["importance"][0, 2:6].any()


@pytest.mark.one_backend("shapes are the same on all")
def test_the_residual_is_a_weight_where_units_differ():
    paths = {name: [path for path in helpers.weights_of(make(name))] for name in STACKS}
    for name in ("adatt-sp", "adatt, one shared"):
        assert not any("native" in path for path in paths[name])
    assert "level_0/native" in paths["adatt-sp, two each"]
    assert {"level_0/shared_native", "level_1/native"} <= set(paths["adatt, shared"])
    assert "level_1/shared_native" not in paths["adatt, shared"]
    assert not any("gates/bias" in path for path in paths["ple"])
    assert "level_0/gates/bias" in paths["adatt-sp"]


def test_ops_take_gradients_through_every_level():
    layer = make("ple")
    helpers.randomize_weights(layer)
    cotangents = {task: np.ones((ROWS, 4), "float32") for task in "abc"}
    _, _, gradients = helpers.values_and_gradients(layer, X, cotangents)
    assert all(np.abs(gradient).sum() > 0 for gradient in gradients.values())
    assert ops.shape(layer.level_2.gates.kernel) == (3, 4, 7)
