"""Gates of tasks: what they weigh, from their definitions, and what dropout and access do."""

import keras
import numpy as np
import pytest

from keras_moe import layers, routers
from tests import helpers

EXPERTS, TASKS, WIDTH, ROWS = 5, 3, 4, 9
X = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype("float32")
ACCESS = [[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 1, 0, 1, 1]]


def build(gate):
    gate.build((None, WIDTH))
    helpers.randomize_weights(gate)
    return gate


def scores_of(gate):
    scores = np.einsum("nd,tde->nte", X.astype("float64"), helpers.weights_of(gate)["kernel"])
    return scores + helpers.weights_of(gate).get("bias", 0.0)


def softmax(scores):
    exponentials = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


@pytest.mark.parametrize("access", [None, ACCESS])
@pytest.mark.parametrize("temperature", [1.0, 0.3])
def test_softmax(temperature, access):
    gate = build(
        routers.SoftmaxGate(EXPERTS, TASKS, temperature=temperature, access=access, use_bias=True)
    )
    record, _ = helpers.call(gate, X)
    open_ = np.ones((TASKS, EXPERTS), bool) if access is None else np.array(access, bool)
    expected = softmax(np.where(open_, scores_of(gate) / temperature, -np.inf))
    helpers.assert_close(record.weights, expected, "weights")
    assert not record.weights[:, ~open_].any() and np.isfinite(record.logits).all()


@pytest.mark.parametrize("access", [None, ACCESS])
@pytest.mark.parametrize("normalize", [False, True])
def test_sigmoid(normalize, access):
    gate = build(routers.SigmoidGate(EXPERTS, TASKS, normalize=normalize, access=access))
    record, _ = helpers.call(gate, X)
    weights = 1.0 / (1.0 + np.exp(-scores_of(gate)))
    weights = weights if access is None else weights * np.array(access)
    shares = weights / weights.sum(-1, keepdims=True)
    helpers.assert_close(record.weights, shares if normalize else weights, "weights")
    helpers.assert_close(softmax(record.logits.astype("float64")), shares, "shares")


@pytest.mark.parametrize("router", ["top_k", "noisy_top_k", "sigmoid_bias", "sinkhorn"])
@pytest.mark.parametrize("access", [None, ACCESS])
def test_a_router_chooses_among_a_tasks_experts(router, access):
    gate = build(routers.RouterGate(EXPERTS, TASKS, router, top_k=2, access=access))
    record, _ = helpers.call(gate, X)
    assert record.weights.shape == (ROWS, TASKS, EXPERTS)
    np.testing.assert_array_equal((record.weights > 0).sum(-1), 2)
    if access is not None:
        assert not record.weights[:, ~np.array(access, bool)].any()
    if router == "top_k":
        for task, own in enumerate(gate.routers):
            experts = np.arange(EXPERTS) if access is None else np.flatnonzero(access[task])
            scores = X @ keras.ops.convert_to_numpy(own.kernel)
            best = np.argsort(-scores, axis=-1, kind="stable")[:, :2]
            expected = np.zeros((ROWS, EXPERTS))
            np.put_along_axis(
                expected, experts[best], softmax(np.take_along_axis(scores, best, -1)), -1
            )
            helpers.assert_close(record.weights[:, task], expected, "weights", tolerance=1e-5)


@pytest.mark.parametrize("static", [False, True])
def test_dselect_k_is_the_routers(static):
    make = routers.DSelectKRouter
    gate = build(
        routers.RouterGate(EXPERTS, TASKS, lambda count: make(count, 2, static=static, seed=0))
    )
    record, losses = helpers.call(gate, X, training=True)
    for task, router in enumerate(gate.routers):
        own, _ = helpers.call(router, X)
        helpers.assert_close(record.weights[:, task], own.weights, "weights")
    if static:
        assert np.ptp(record.weights, axis=0).max() < 1e-6
    assert len(losses) == 2 * TASKS  # the entropy, and codes past the experts


def test_losses_of_routers_are_added_with_their_coefficients():
    layer = layers.MMoE(4, [8], 2, gate="noisy_top_k", seed=0)
    layer.build((None, WIDTH))
    helpers.randomize_weights(layer)
    _, losses = helpers.call(layer, X, training=True)
    assert len(losses) == 4 and all(loss > 0 for loss in losses)
    layer.gates.trainable = False
    _, losses = helpers.call(layer, X, training=True)
    assert not losses


def test_the_losses_of_two_calls_in_a_step_are_in_the_loss_of_fit():
    gate = routers.RouterGate(5, 1, lambda n: routers.DSelectKRouter(n, losses={"entropy": 1.0}))
    layer = layers.MMoE(5, [WIDTH], 1, gate=gate)
    inputs = keras.Input((WIDTH,))
    model = keras.Model(inputs, layer(layer(inputs)[0])[0])
    helpers.randomize_weights(model)
    zero = keras.losses.MeanSquaredError()
    model.compile(keras.optimizers.SGD(0.0), lambda y, p: 0.0 * zero(y, p))
    model(X, training=True)
    losses = [float(keras.ops.convert_to_numpy(loss)) for loss in model.losses]
    assert len(losses) == len(set(losses)) == 4  # the entropy and unused codes, of each call
    np.testing.assert_allclose(model.train_on_batch(X, X), sum(losses), rtol=1e-5)


@pytest.mark.parametrize("kind", [routers.SoftmaxGate, routers.SigmoidGate])
def test_dropout_keeps_the_sum_and_one_expert(kind):
    gate = build(kind(EXPERTS, TASKS, dropout=0.7, access=ACCESS, seed=3))
    kept, _ = helpers.call(gate, X)
    dropped, _ = helpers.call(gate, X, training=True)
    np.testing.assert_allclose(dropped.weights.sum(-1), kept.weights.sum(-1), rtol=1e-5)
    is_out = (dropped.weights == 0) & (kept.weights > 0)
    assert 0.3 < is_out.sum() / (kept.weights > 0).sum() < 0.8
    assert (dropped.weights > 0).any(-1).all()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: routers.RouterGate(4, 2, "expert_choice"), "`router` must be one of"),
        (lambda: routers.RouterGate(4, 2, lambda n: routers.TopKRouter(3)), "num_experts=4"),
        (lambda: routers.RouterGate(4, 2, lambda n: "top_k"), "a function of a number of experts"),
        (lambda: routers.RouterGate(4, 2, top_k=5), "`top_k` must be at most the experts"),
        (lambda: routers.SoftmaxGate(4, 2, temperature=0.0), "`temperature` must be"),
        (lambda: routers.SoftmaxGate(2, 1, access=[[0, 0]]), "task 0 has none"),
        (
            lambda: layers.MMoE(4, 8, 2, gate=routers.SoftmaxGate(4, 2), gate_dropout=0.1),
            "`gate_dropout` must be 0 where `gate` is an object",
        ),
        (
            lambda: layers.MMoE(4, 8, 2, gate="top_k", gate_use_bias=True),
            "`gate_use_bias` must be False",
        ),
        (
            lambda: layers.MMoE(2, 8, 2, gate=routers.SoftmaxGate(2, 2), access=[[1, 0], [0, 1]]),
            "`access` must be None where `gate` is an object",
        ),
    ],
)
def test_bad_arguments_are_refused(make, message):
    with pytest.raises((ValueError, TypeError), match=message):
        make()


@pytest.mark.parametrize(
    "gate",
    [
        "sigmoid",
        "top_k",
        "dselect_k",
        lambda: routers.SoftmaxGate(4, 2, temperature=2.0, access=[[1, 1, 0, 0], [0, 1, 1, 1]]),
        lambda: routers.SigmoidGate(4, 2, normalize=True, dropout=0.1),
        lambda: routers.RouterGate(4, 2, lambda n: routers.TopKRouter(n, 1, normalize=False)),
    ],
)
def test_an_mmoe_trains_with_it_and_is_loaded(gate, tmp_path):
    keras.utils.set_random_seed(0)
    gate = gate if isinstance(gate, str) else gate()
    inputs = keras.Input((WIDTH,))
    outputs = layers.MMoE(4, [16], ["a", "b"], gate=gate, name="mmoe")(inputs)
    model = keras.Model(inputs, {t: keras.layers.Dense(1, name=t)(y) for t, y in outputs.items()})
    model.compile(keras.optimizers.Adam(0.03), "mse")
    x = np.tile(X, (6, 1))
    targets = {"a": x[:, :1], "b": x[:, 1:2]}
    history = model.fit(x, targets, epochs=6, batch_size=27, verbose=0).history["loss"]
    assert history[-1] < 0.9 * history[0]
    counts = model.get_layer("mmoe").running_counts()
    assert counts["decisions"] == 6 * len(x) and np.isfinite(counts["entropy"]).all()
    model.save(tmp_path / "model.keras")
    loaded = keras.models.load_model(tmp_path / "model.keras")
    for task in "ab":
        np.testing.assert_allclose(
            loaded.predict(x, verbose=0)[task],
            model.predict(x, verbose=0)[task],
            rtol=1e-5,
            atol=1e-6,
        )
