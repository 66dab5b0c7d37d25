"""What watches mixtures works on a Keras 2 model with bridges, and on what is inside of one."""

import json
import re

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_recommenders as tfrs
import tf_keras

import keras_moe
from keras_moe import callbacks, layers, plots
from keras_moe.inspection.recording import count_routing
from keras_moe.integrations.tfrs import KerasBridge
from keras_moe.models import task_gates

N, T, D = 48, 4, 6
rng = np.random.default_rng(0)
TOKENS = rng.normal(size=(N, T, D)).astype("float32")
TARGETS = rng.normal(size=(N, 1)).astype("float32")
CLASSES = np.arange(N) % 3
IMAGES = rng.uniform(size=(N, 8, 8)).astype("float32")


@keras.saving.register_keras_serializable("bridge_watching")
class Block(keras.Model):
    """Keras 3 layers that a call builds."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.moe = layers.MoE(4, 8, capacity_factor=1.0, name="moe", seed=0)
        self.soft = layers.SoftMoE(2, 8, slots_per_expert=2, name="soft")

    def call(self, x, training=None):
        return x + self.soft(x + self.moe(x, training=training))


def functional_block():
    inputs = keras.Input((T, D))
    outputs = layers.MoE(4, 8, capacity_factor=1.0, name="moe", seed=0)(inputs)
    return keras.Model(inputs, outputs + layers.SoftMoE(2, 8, name="soft")(outputs))


def sequential_block():
    moe = layers.MoE(4, 8, capacity_factor=1.0, name="moe", seed=0)
    return keras.Sequential([moe, layers.SoftMoE(2, 8, slots_per_expert=2, name="soft")])


def mmoe():
    return layers.MMoE(3, [5], ["a", "b"], name="tasks")


def functional_net(block):
    inputs = tf_keras.Input((T, D))
    tasks = KerasBridge(mmoe())(tf.reduce_mean(KerasBridge(block)(inputs), axis=1))
    return tf_keras.Model(inputs, tf_keras.layers.Dense(1)(tasks["a"] + tasks["b"]))


class Inner(tf_keras.layers.Layer):
    """A user's own Keras 2 layer around a bridge."""

    def __init__(self, block):
        super().__init__()
        self.parts = [KerasBridge(block)]

    def call(self, inputs):
        return self.parts[0](inputs)


class SubclassedNet(tf_keras.Model):
    """Without `training` among its arguments."""

    def __init__(self, block):
        super().__init__()
        self.inner, self.tasks = Inner(block), KerasBridge(mmoe())
        self.head = tf_keras.layers.Dense(1)

    def call(self, inputs):
        tasks = self.tasks(tf.reduce_mean(self.inner(inputs), axis=1))
        return self.head(tasks["a"] + tasks["b"])


class RankingNet(tfrs.Model):
    """One whose `fit` gets its losses from a task."""

    def __init__(self, block):
        super().__init__()
        self.net = SubclassedNet(block)
        self.task = tfrs.tasks.Ranking(loss=tf_keras.losses.MeanSquaredError())

    def call(self, inputs, training=None):
        return self.net(inputs)

    def compute_loss(self, inputs, training=False):
        x, y = inputs
        return self.task(labels=y, predictions=self(x, training=training))


NETS = [functional_net, SubclassedNet, RankingNet]
BLOCKS = [Block, functional_block, sequential_block]


def trained(make_net, make_block, **fit):
    """A Keras 2 model after two epochs."""
    keras.utils.set_random_seed(0)
    net = make_net(make_block())
    net.compile(tf_keras.optimizers.Adam(0.01), None if make_net is RankingNet else "mse")
    data = tf.data.Dataset.from_tensor_slices((TOKENS, TARGETS)).batch(16)
    return net, net.fit(data, epochs=2, verbose=0, **fit).history


@pytest.mark.filterwarnings("ignore::keras_moe.callbacks.ExpertAlarm")
@pytest.mark.parametrize("make_net", NETS)
def test_the_monitor_watches_a_fit_of_keras_2(make_net, tmp_path):
    monitor = callbacks.ExpertMonitor(
        every=1, json=tmp_path / "experts.jsonl", csv=tmp_path / "experts.csv"
    )
    stop = tf_keras.callbacks.EarlyStopping(monitor="moe/load_cv", mode="min", patience=5)
    _, history = trained(make_net, Block, callbacks=[monitor, stop])
    expected = {"moe/load_cv", "moe/dropped", "moe/entropy", "soft/importance_cv", "soft/entropy"}
    expected |= {"tasks/importance_cv", "tasks/entropy"}
    assert expected <= set(history)
    assert all(len(history[name]) == 2 and np.isfinite(history[name]).all() for name in expected)
    first, second = map(json.loads, (tmp_path / "experts.jsonl").read_text().splitlines())
    # Each epoch on its own: 48 examples of 4 tokens, to 2 experts each.
    assert first["counts"]["moe"]["assignments"] == second["counts"]["moe"]["assignments"] == 384
    assert [row["moe/load_cv"] for row in (first, second)] == history["moe/load_cv"]
    assert len((tmp_path / "experts.csv").read_text().splitlines()) == 3


@pytest.mark.filterwarnings("ignore::keras_moe.callbacks.ExpertAlarm")
def test_the_monitor_says_the_same_as_in_keras_3():
    def model(wrap, keras_of):
        keras.utils.set_random_seed(0)
        mixture = layers.MoE(4, 8, name="moe", seed=0, dispatch="dense")
        net = keras_of.Sequential([wrap(mixture), keras_of.layers.Flatten()])
        net.compile(keras_of.optimizers.SGD(0.1), "mse")
        targets = TOKENS.reshape(N, -1)
        return net.fit(
            *(TOKENS, targets),
            batch_size=16,
            epochs=2,
            shuffle=False,
            verbose=0,
            callbacks=[callbacks.ExpertMonitor()],
        ).history

    through, plain = model(KerasBridge, tf_keras), model(lambda layer: layer, keras)
    for name in ("moe/load_cv", "moe/entropy"):
        np.testing.assert_allclose(through[name], plain[name], rtol=1e-4, err_msg=name)


def test_the_monitor_leaves_evaluate_and_predict_alone():
    net = functional_net(functional_block())
    net.compile("sgd", "mse")
    monitor = callbacks.ExpertMonitor()
    expected = net.evaluate(TOKENS, TARGETS, verbose=0), net.predict(TOKENS, verbose=0)
    found = (
        net.evaluate(TOKENS, TARGETS, verbose=0, callbacks=[monitor]),
        net.predict(TOKENS, verbose=0, callbacks=[monitor]),
    )
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@pytest.fixture(scope="module", params=[functional_net, RankingNet], ids=lambda net: net.__name__)
def net(request):
    return trained(request.param, Block)[0]


def test_records_of_a_keras_2_model(net):
    with keras_moe.record_routing(net) as records:
        net(TOKENS[:5])
    assert {name: len(calls) for name, calls in records.items()} == dict.fromkeys(records, 1)
    assert set(records) == {"moe", "soft", "tasks"}
    assert records["moe"][0].experts.shape == (5, T, 2)
    with count_routing(net) as counts:
        net(TOKENS)
    assert counts["moe"]["assignments"] == N * T * 2


PICTURES = {
    "expert_load": lambda model: plots.expert_load(model, TOKENS),
    "class_by_expert": lambda model: plots.class_by_expert(model, TOKENS, CLASSES, layer="moe"),
    "coactivation": lambda model: plots.coactivation(model, TOKENS, layer="moe"),
    "slot_similarity": lambda model: plots.slot_similarity(model),
    "token_experts": lambda model: plots.token_experts(
        model, TOKENS[:1], list("wxyz"), layer="moe"
    ),
    "patch_experts": lambda model: plots.patch_experts(
        model, TOKENS, pictures=IMAGES, layer="soft"
    ),
}


def test_pictures_of_a_keras_2_model(net):
    for draw in PICTURES.values():
        assert draw(net).axes
    assert plots.task_gates(net, TOKENS).axes


def test_a_report_about_a_keras_2_model(net, tmp_path):
    page = keras_moe.report(net, (TOKENS, CLASSES), tmp_path / "page.html").read_text()
    weights = sum(int(np.prod(w.shape)) for w in net.trainable_weights)
    expert = D * 8 + 8 + 8 * D + D
    lead = re.sub("<[^>]*>", "", page)
    assert f"with {weights} parameters, of which a token meets {weights - 2 * expert}." in lead
    assert all(f'id="layer-{number}"' in page for number in range(3))


@pytest.mark.parametrize("make_block", BLOCKS)
def test_what_is_inside_of_a_bridge(make_block, tmp_path):
    block = make_block()
    trained(functional_net, lambda: block)
    assert plots.expert_load(block, TOKENS).axes and plots.slot_similarity(block).axes
    with keras_moe.record_routing(block) as records:
        block(TOKENS)
    assert set(records) == {"moe", "soft"}
    keras_moe.report(block, (TOKENS, CLASSES), tmp_path / "page.html")


def test_a_keras_2_model_without_mixtures_is_named():
    net = tf_keras.Sequential([tf_keras.layers.Dense(1)], name="plain")
    net(TOKENS)
    with pytest.raises(ValueError, match=r"must have a mixture layer .* Received: model='plain'"):
        plots.expert_load(net, TOKENS)
    with pytest.raises(ValueError, match="`model` must be a Keras 3 model or layer"):
        task_gates(functional_net(Block()))
