"""Training provokes each alarm, its advice fits the layer, and healthy runs raise none."""

import warnings

import keras
import numpy as np
import pytest

import keras_moe
from keras_moe import callbacks, layers, routers
from keras_moe.inspection.alarms import alarms

pytestmark = pytest.mark.one_backend("alarms are of NumPy arrays")

WIDTH = 8


def towards(*rows, scale=6.0):
    """An initializer of a router, or of gates: class c of the data goes to expert c."""

    def initializer(shape, dtype=None):
        kernel = np.zeros(shape, "float32")
        for column, row in enumerate(rows or np.eye(*shape[-2:])):
            kernel[..., column, : len(row)] = scale * np.asarray(row)
        return keras.ops.convert_to_tensor(kernel)

    return initializer


def top_1(num_experts, scale=6.0, **losses):
    losses = {"balance": 0.0, "z_loss": 0.0, **losses}
    kernel = towards(scale=scale)
    return routers.TopKRouter(num_experts, 1, losses=losses, kernel_initializer=kernel)


def classes(*counts, in_order=False):
    """Examples near the unit vectors of their classes, so many of each."""
    labels = np.repeat(np.arange(len(counts)), counts)
    random = np.random.default_rng(0)
    if not in_order:
        random.shuffle(labels)
    return (np.eye(WIDTH)[labels] + random.normal(size=(len(labels), WIDTH)) / 50).astype("float32")


def fit(mixture, x, epochs=2, batch_size=64, **monitor):
    """The alarms of a short training, the model and its history."""
    inputs = keras.Input(x.shape[1:])
    outputs = [keras.layers.Dense(2)(o) for o in keras.tree.flatten(mixture(inputs))]
    model = keras.Model(inputs, outputs)
    model.compile(keras.optimizers.Adam(1e-3), ["mse"] * len(outputs))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        history = model.fit(
            x,
            [np.abs(x[..., :2])] * len(outputs),
            batch_size=batch_size,
            epochs=epochs,
            verbose=0,
            shuffle=False,
            callbacks=[callbacks.ExpertMonitor(**{"metrics": "all", **monitor})],
        )
    return [w for w in caught if w.category is callbacks.ExpertAlarm], model, history.history


def moe(num_experts, scale=6.0, **arguments):
    router = top_1(num_experts, scale)
    return layers.MoE(num_experts, 8, router=router, name="mixture", **arguments)


def gates(*rows, experts):
    """Gates that see a constant input, with these logits by expert for both tasks."""
    return layers.MMoE(
        experts,
        [8],
        ["ctr", "like"],
        gate_initializer=towards(*rows, scale=1.0),
        name="mixture",
    )


EVEN = (128, 128, 128, 128)
CONSTANT = classes(512)
PROVOKED = {
    "dead": (lambda: moe(4), classes(400, 56, 56), "1 of 4 experts get less than 1 % of their"),
    "collapse": (
        lambda: moe(8),
        classes(376, 100, *[6] * 6),
        "The load is that of 2.4 experts of equal use, out of 8",
    ),
    "starved": (lambda: moe(4), classes(168, 168, 170, 6), "Expert 3 gets 5 % of its fair share"),
    "imbalance": (
        lambda: moe(4),
        classes(*EVEN, in_order=True),
        "within a batch the spread of the load over its mean is 1.7",
    ),
    "saturation": (lambda: moe(4, 60.0), classes(*EVEN), "The router is all but sure"),
    "drops": (
        lambda: moe(4, capacity_factor=0.8),
        classes(*EVEN),
        "Try a `capacity_factor` of 1 or more, since 0.8 has room for 80 % of the assignments",
    ),
    "few": (
        lambda: gates([2.5, 2.5, -0.6, -0.6, -0.6, -0.6], experts=6),
        CONSTANT,
        "of 6 experts, the mean of tasks. Try `gate_dropout=0.1`",
    ),
    "polarisation": (
        lambda: gates([5.0, 1.0], experts=2),
        CONSTANT,
        "Gates that take one expert alone: 'ctr' (expert 0), 'like' (expert 0).",
    ),
    "uniform": (
        lambda: layers.SoftMoE(
            4, 8, scale_initializer=keras.initializers.Constant(0.05), name="mixture"
        ),
        np.random.default_rng(0).normal(size=(64, 8, WIDTH)).astype("float32"),
        "larger `scale_initializer`",
    ),
}


@pytest.mark.parametrize("kind", PROVOKED)
def test_training_provokes_it(kind, tmp_path):
    make, x, said = PROVOKED[kind]
    keras.utils.set_random_seed(0)
    caught, model, _ = fit(make(), x, json=tmp_path / "h.jsonl")
    messages = [str(each.message) for each in caught]
    assert any(said in message for message in messages), messages
    # A page about a few examples says the same of the last epoch.
    page = keras_moe.report(
        model, x[:4], tmp_path / "p.html", history=tmp_path / "h.jsonl"
    ).read_text(encoding="utf-8")
    assert "mixture, in training, epoch 2" in page
    assert 'class="ill"' in page and "No alarm in" not in page


def test_an_imbalance_that_moves_is_seen_in_a_batch_only():
    keras.utils.set_random_seed(0)
    _, model, history = fit(moe(4), classes(*EVEN, in_order=True))
    assert max(history["mixture/load_cv"]) < 0.05
    assert min(history["mixture/batch_cv"]) > 1.7
    x, watch = classes(*EVEN), callbacks.ExpertMonitor(metrics="all", alarms=False)
    after = model.fit(x, x[:, :2], batch_size=64, verbose=0, callbacks=[watch]).history
    assert after["mixture/worst_batch_cv"][0] < 0.6  # of this epoch alone
    assert after["mixture/batch_cv"][0] < after["mixture/worst_batch_cv"][0]


def test_one_uneven_batch_among_many_is_no_alarm():
    """The first batch of a training often is."""
    layer = layers.MoE(8, 8, name="mixture")
    rng = np.random.default_rng(0)
    layer(np.ones((64, 6), "float32"), training=True)  # equal tokens: all want the same two
    for _ in range(30):
        layer(rng.normal(size=(64, 6)).astype("float32"), training=True)
    counts = layer.running_counts()
    assert counts["worst_batch_cv"] == pytest.approx(3**0.5, abs=1e-3)  # of two of eight experts
    assert counts["batch_cv"] / counts["batches"] < 0.8
    assert list(alarms(layer, counts)) == []


HEALTHY = {
    "moe": lambda: layers.MoE(4, 8, name="mixture"),
    "switch": lambda: layers.SwitchFFN(4, 8, capacity_factor=2.0, name="mixture"),
    "sigmoid_bias": lambda: layers.MoE(4, 8, router="sigmoid_bias", name="mixture"),
    "soft": lambda: layers.SoftMoE(4, 8, name="mixture"),
    "mmoe": lambda: layers.MMoE(4, [8], 2, name="mixture"),
}


@pytest.mark.parametrize("name", HEALTHY)
def test_ten_healthy_runs_raise_none(name):
    for seed in range(10):
        keras.utils.set_random_seed(seed)
        x = np.random.default_rng(seed).normal(size=(512, WIDTH)).astype("float32")
        x = x.reshape(64, 8, WIDTH) if name == "soft" else x
        caught, _, history = fit(HEALTHY[name](), x, batch_size=128)
        assert not caught, (seed, [str(each.message) for each in caught])
        assert len(history["mixture/least_share"]) == 2


def test_advice_is_possible_and_sees_the_settings():
    def advice(layer):
        caught, _, _ = fit(layer, np.abs(classes(512)) + 3.0)
        return " ".join(str(each.message) for each in caught)

    switch = advice(layers.SwitchFFN(4, 8, balance_weight=0.0))
    assert "`balance_weight=0.01` (it is 0 now)" in switch
    assert "router=" not in switch  # which it refuses
    balanced = advice(layers.MoE(4, 8, top_k=1, balance_weight=1e-4))
    assert "a balance loss of a coefficient above 0.0001" in balanced
    assert "`router='sigmoid_bias'`" in balanced
    given = advice(layers.MoE(4, 8, router=top_1(4)))
    assert "`TopKRouter(losses={'balance': 0.01})` (it is 0 now)" in given
    biased = advice(layers.MoE(4, 8, top_k=1, router="sigmoid_bias"))
    assert "`bias_update_rate` above 0.001" in biased
    assert "router='sigmoid_bias'" not in biased


def test_a_starved_slot_is_told_from_a_starved_expert():
    slots = np.array([[50.0, 1.0], [60.0, 40.0]])
    counts = {"importance": slots.sum(axis=-1), "slot_importance": slots, "decisions": 151.0}
    counts |= {"entropy": 60.0, "sequences": 10.0, "dispatch_min": 5.0, "dispatch_max": 20.0}
    (alarm,) = alarms(layers.SoftMoE(2, 8, slots_per_expert=2), counts)
    assert alarm.kind == "starved"
    assert alarm.message == "A slot gets 3 % of the mean slot's weight. Try fewer experts."


def test_the_text_has_no_line_of_source():
    caught, _, _ = fit(PROVOKED["drops"][0](), PROVOKED["drops"][1])
    shown = warnings.formatwarning(
        caught[0].message, caught[0].category, caught[0].filename, caught[0].lineno
    )
    assert shown.count("\n") == 1
    assert shown.startswith("ExpertMonitor:0: ExpertAlarm: mixture, epoch 1: ")
