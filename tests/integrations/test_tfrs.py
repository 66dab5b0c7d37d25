"""KerasBridge: a Keras 3 layer in a Keras 2 model behaves as it does in a Keras 3 model."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import tensorflow_recommenders as tfrs
import tf_keras

from keras_moe import layers
from keras_moe.integrations.tfrs import KerasBridge

BATCH = 8
RTOL = 1e-5
ATOL = 1e-6


# --- Keras 3 layers under test -------------------------------------------------------------------


@keras.saving.register_keras_serializable(package="bridge_tests")
class LossLayer(keras.layers.Layer):
    """A loss of each call, and weight and activity regularizers."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.inner = keras.layers.Dense(3, kernel_regularizer=keras.regularizers.L2(0.1))
        self.outer = keras.layers.Dense(2, activity_regularizer=keras.regularizers.L2(0.01))

    def build(self, input_shape):
        self.inner.build(input_shape)
        self.outer.build((*input_shape[:-1], 3))

    def call(self, inputs):
        hidden = self.inner(inputs)
        self.add_loss(0.5 * keras.ops.mean(keras.ops.square(hidden)))
        return self.outer(hidden)


@keras.saving.register_keras_serializable(package="bridge_tests")
class NestedLayer(keras.layers.Layer):
    """Two kernels, a seed and running statistics; no `build` of its own, automatic names."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.first = keras.layers.Dense(4, activation="relu")
        self.norm = keras.layers.BatchNormalization(momentum=0.5)
        self.dropout = keras.layers.Dropout(0.5, seed=3)
        self.last = keras.layers.Dense(2)

    def call(self, inputs, training=None):
        hidden = self.norm(self.first(inputs), training=training)
        return self.last(self.dropout(hidden, training=training))


def functional():
    """Dict in; dict of a tensor and a list out."""
    user = keras.Input((3,), name="user")
    item = keras.Input((5,), name="item")
    hidden = keras.layers.Concatenate()([keras.layers.Dense(4)(user), keras.layers.Dense(4)(item)])
    rating = keras.layers.Dense(1)(hidden)
    towers = [keras.layers.Dense(2)(hidden), keras.layers.Dense(3, activation="tanh")(hidden)]
    return keras.Model({"user": user, "item": item}, {"rating": rating, "towers": towers})


def sequential():
    return keras.Sequential(
        [
            keras.layers.Dense(6, activation="relu"),
            keras.layers.BatchNormalization(momentum=0.5),
            keras.layers.Dropout(0.3, seed=5),
            keras.layers.Dense(2),
        ]
    )


def masked():
    return keras.Sequential(
        [
            keras.layers.Embedding(7, 4, mask_zero=True),
            keras.layers.Dense(3),
            keras.layers.GlobalAveragePooling1D(),
        ]
    )


def masked_moe():
    return keras.Sequential(
        [
            keras.layers.Embedding(7, 4, mask_zero=True),
            layers.MoE(4, 8),
            keras.layers.GlobalAveragePooling1D(),
        ]
    )


def layer_experts():
    return layers.LayerExperts(keras.layers.Dense(3), BATCH)


# --- Helpers -------------------------------------------------------------------------------------


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def tokens():
    ids = np.random.default_rng(0).integers(1, 7, size=(BATCH, 3))
    return np.pad(ids, ((0, 0), (0, 2))).astype("int32")


def flatten_outputs(outputs):
    return tf.concat([tf.reshape(x, (BATCH, -1)) for x in tf.nest.flatten(outputs)], axis=-1)


@keras.saving.register_keras_serializable(package="bridge_tests")
class Keras3Net(keras.Model):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def call(self, inputs, training=None):
        return flatten_outputs(self.layer(inputs, training=training))


class BridgeNet(tf_keras.Model):
    def __init__(self, layer):
        super().__init__()
        self.bridge = KerasBridge(layer)

    def call(self, inputs):
        return flatten_outputs(self.bridge(inputs))


def values(layer):
    return [np.array(variable.numpy()) for variable in layer.variables]


def assert_same(left, right, rtol=RTOL, atol=ATOL):
    assert len(left) == len(right)
    for a, b in zip(left, right, strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)


def build(layer, inputs):
    """Builds a Keras 3 layer without running it: no seed moves on."""
    layer(tf.nest.map_structure(lambda x: keras.KerasTensor(x.shape, x.dtype.name), inputs))
    return layer


def copy_state(source, target):
    for variable, value in zip(target.variables, source.variables, strict=True):
        variable.assign(value)


def run_python(code, *arguments, **environment):
    """Runs `code` in a fresh process; None unsets a variable."""
    variables = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
    process = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env={name: value for name, value in variables.items() if value is not None},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]


@dataclass(frozen=True)
class Case:
    name: str
    make: Any
    inputs: Any

    def __str__(self):
        return self.name


CASES = [
    Case("dense", lambda: keras.layers.Dense(3), normal(BATCH, 4)),
    Case("losses", LossLayer, normal(BATCH, 4)),
    Case("nested", NestedLayer, normal(BATCH, 4)),
    Case("sequential", sequential, normal(BATCH, 4)),
    Case("functional", functional, {"user": normal(BATCH, 3), "item": normal(BATCH, 5, seed=1)}),
    Case("masked", masked, tokens()),
    Case("moe", lambda: layers.MoE(4, 8, top_k=2, seed=1), normal(BATCH, 6, 5)),
    Case(
        "moe_regularized",
        lambda: layers.MoE(4, 8, kernel_regularizer="l2", dropout=0.3, seed=1),
        normal(BATCH, 5),
    ),
    Case("switch_ffn", lambda: layers.SwitchFFN(4, 8, jitter=0.1, seed=1), normal(BATCH, 6, 5)),
    Case("soft_moe", lambda: layers.SoftMoE(4, 8), normal(BATCH, 6, 5)),
    Case("mmoe", lambda: layers.MMoE(4, [8, 4], 2), normal(BATCH, 5)),
    Case("mmoe_named", lambda: layers.MMoE(4, [8, 4], ["click", "like"]), normal(BATCH, 5)),
    Case("expert_mlp", lambda: layers.ExpertMLP(BATCH, [8, 5]), normal(BATCH, 3, 5)),
    Case("layer_experts", layer_experts, normal(BATCH, 3, 5)),
    Case("masked_moe", masked_moe, tokens()),
]


@pytest.fixture(params=CASES, ids=str)
def case(request):
    return request.param


# --- Training ------------------------------------------------------------------------------------


class SummedAdam(keras.optimizers.Adam):
    """Adam of Keras 3.15 on TensorFlow squares the gradient of a repeated row piece by piece, so
    that its step is too long. Keras 2 sums the pieces first, as this one does."""

    def apply(self, grads, trainable_variables=None):
        return super().apply([tf.convert_to_tensor(grad) for grad in grads], trainable_variables)


# An epsilon above the gradients' rounding noise: Adam would scale that noise up to a full step.
OPTIMIZERS = {
    "sgd": (keras.optimizers.SGD(0.1), tf_keras.optimizers.SGD(0.1)),
    "adam": (SummedAdam(0.01, epsilon=1e-3), tf_keras.optimizers.Adam(0.01, epsilon=1e-3)),
}


@pytest.mark.parametrize(("optimizer", "eagerly"), [("adam", False), ("sgd", True)])
def test_training_steps_equal_those_of_keras_3(case, optimizer, eagerly):
    reference, layer = build(case.make(), case.inputs), build(case.make(), case.inputs)
    copy_state(reference, layer)
    start = values(layer)
    expected, actual = Keras3Net(reference), BridgeNet(layer)
    outputs = actual(case.inputs)
    assert_same([outputs], [expected(case.inputs)])
    targets = normal(*outputs.shape, seed=2)
    for model, prototype in zip((expected, actual), OPTIMIZERS[optimizer], strict=True):
        model.compile(prototype.from_config(prototype.get_config()), "mse", run_eagerly=eagerly)

    options = {"batch_size": BATCH, "verbose": 0}
    losses = [
        model.fit(case.inputs, targets, epochs=2, shuffle=False, **options).history["loss"]
        for model in (actual, expected)
    ]
    np.testing.assert_allclose(*losses, rtol=RTOL)
    assert_same(values(layer), values(reference))
    for variable, value in zip(layer.variables, start, strict=True):
        if variable.name != "loss_weights":  # which only a user changes
            assert np.any(variable.numpy() != value), f"{variable.path} did not change"
    np.testing.assert_allclose(
        actual.evaluate(case.inputs, targets, **options),
        expected.evaluate(case.inputs, targets, **options),
        rtol=RTOL,
    )
    assert_same(
        [actual.predict(case.inputs, **options)], [expected.predict(case.inputs, **options)]
    )


def test_a_keras_2_model_lists_each_variable_once():
    layer = build(NestedLayer(), normal(BATCH, 4))
    first, second = KerasBridge(layer), KerasBridge(layer)
    inputs = tf_keras.Input((4,))
    outputs = tf_keras.layers.Dense(1)(first(inputs) + second(inputs))
    model = tf_keras.Model(inputs, outputs)
    trainable = {id(variable.value) for variable in layer.trainable_weights}
    assert len(model.trainable_variables) == len(trainable) + 2
    assert trainable < {id(variable) for variable in model.trainable_variables}
    assert len(model.weights) == len(layer.weights) + 2
    assert first.count_params() == layer.count_params()
    assert model.count_params() == layer.count_params() + 3
    lines = []
    model.summary(print_fn=lines.append)
    assert f"Total params: {layer.count_params() + 3} " in "\n".join(lines)


def test_the_bridge_builds_at_the_first_call_or_with_a_built_layer():
    bridge = KerasBridge(keras.layers.Embedding(7, 4))
    assert not bridge.built and bridge.weights == []
    assert bridge(tf_keras.Input((None,), dtype="int32")).shape == (None, None, 4)
    assert bridge.built and bridge.weights[0].shape == (7, 4)
    for size in (1, 3):
        assert bridge(np.ones((size, 2), "int32")).shape == (size, 2, 4)
    built = KerasBridge(functional())
    assert built.built and len(built.weights) == 10


def test_several_arguments_reach_the_layer():
    layer = keras.layers.MultiHeadAttention(2, 3, seed=0)
    bridge = KerasBridge(layer)
    query, value = normal(2, 3, 4), normal(2, 5, 4, seed=1)
    mask = np.arange(5)[None] < np.array([[3], [5]])
    outputs = bridge(query, value, value_mask=tf.constant(mask))
    assert_same([outputs], [layer(query, value, value_mask=mask)])
    assert not np.allclose(outputs, layer(query, value))
    _, scores = bridge(query, value, return_attention_scores=True)
    assert scores.shape == (2, 2, 3, 5)
    implicit = tf.constant(value)
    implicit._keras_mask = tf.constant(mask)
    assert_same([bridge(query, implicit)], [outputs])


# --- trainable -----------------------------------------------------------------------------------


def test_trainable_is_one_switch_for_both_sides():
    layer = build(NestedLayer(), normal(BATCH, 4))
    layer.first.trainable = False
    bridge = KerasBridge(layer)
    model = tf_keras.Sequential([bridge])
    assert bridge.trainable
    assert len(bridge.trainable_weights) == 4 and len(bridge.non_trainable_weights) == 4
    model.trainable = False  # a parent of Keras 2
    assert not layer.trainable and not layer.norm.trainable and bridge.trainable_weights == []
    bridge.trainable = True  # the bridge; as in Keras, for all sublayers
    assert layer.first.trainable and len(bridge.trainable_weights) == 6
    layer.trainable = False  # Keras 3
    assert not bridge.trainable and bridge.trainable_weights == []
    assert not KerasBridge(NestedLayer(), trainable=False).layer.trainable


@pytest.mark.parametrize("frozen", ["bridge", "model", "sublayer"])
def test_what_is_frozen_stays_in_fit(frozen):
    layer = build(NestedLayer(), normal(BATCH, 4))
    bridge = KerasBridge(layer)
    model = tf_keras.Sequential([bridge, tf_keras.layers.Dense(1)])
    {"bridge": bridge, "model": model, "sublayer": layer.norm}[frozen].trainable = False
    before = values(layer.norm)
    first = values(layer.first)
    model.compile("sgd", "mse")
    model.fit(normal(BATCH, 4), normal(BATCH, 1), verbose=0)
    # A frozen BatchNormalization runs in inference mode: its moving statistics stay as well.
    assert_same(values(layer.norm), before, rtol=0, atol=0)
    assert np.array_equal(first[0], values(layer.first)[0]) == (frozen != "sublayer")


# --- training flag, state and masks --------------------------------------------------------------


@keras.saving.register_keras_serializable(package="bridge_tests")
class TrainingProbe(keras.layers.Layer):
    """Adds 1 when training, 0 when not."""

    def call(self, inputs, training=None):
        return inputs + (1.0 if training else 0.0)


class Outer(tf_keras.layers.Layer):
    """Passes nothing on: Keras 2 knows the mode from the outermost call."""

    def __init__(self):
        super().__init__()
        self.bridge = KerasBridge(keras.Sequential([TrainingProbe()]))

    def call(self, inputs):
        return self.bridge(inputs)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("training", [None, False, True])
def test_the_training_flag_is_forwarded(graph, training):
    outer = Outer()
    for layer in (outer.bridge, outer):
        call = tf.function(layer) if graph else layer
        inputs = tf.zeros((1, 2))
        outputs = call(inputs) if training is None else call(inputs, training=training)
        np.testing.assert_array_equal(outputs, np.full((1, 2), float(training or False)))


def test_the_training_flag_comes_from_the_learning_phase():
    with pytest.warns(UserWarning, match="deprecated"):
        tf_keras.backend.set_learning_phase(1)
    try:
        np.testing.assert_array_equal(Outer()(tf.zeros((1, 2))), np.ones((1, 2)))
    finally:
        tf_keras.backend.clear_session()


def test_a_training_flag_unknown_at_tracing_is_refused():
    bridge = KerasBridge(TrainingProbe())
    call = tf.function(lambda training: bridge(tf.zeros((1, 2)), training=training))
    with pytest.raises(ValueError, match=r"`training` must be known when the graph is traced"):
        call(tf.constant(True))
    np.testing.assert_array_equal(bridge(tf.zeros((1, 2)), training=tf.constant(True)), [[1, 1]])


@pytest.mark.parametrize("graph", [False, True])
def test_dropout_draws_anew_each_step_and_is_off_in_inference(graph):
    bridge = KerasBridge(keras.layers.Dropout(0.5, seed=0))
    call = tf.function(bridge) if graph else bridge
    inputs = tf.ones((4, 50))
    first, second = call(inputs, training=True).numpy(), call(inputs, training=True).numpy()
    assert set(np.unique(first)) == {0.0, 2.0}
    assert np.any(first != second)
    np.testing.assert_array_equal(call(inputs, training=False), inputs)


def test_jitter_of_a_keras_moe_layer_is_on_in_training_only():
    bridge = KerasBridge(layers.SwitchFFN(4, 8, jitter=0.5, seed=0))
    inputs = normal(2, 64, 5)
    training = [bridge(inputs, training=True).numpy() for _ in range(2)]
    inference = [bridge(inputs).numpy() for _ in range(2)]
    assert np.any(training[0] != training[1])
    np.testing.assert_array_equal(*inference)


def test_running_counts_of_a_keras_moe_layer_move_in_fit_only():
    layer = build(layers.MoE(4, 8), normal(BATCH, 5))
    model = tf_keras.Sequential([KerasBridge(layer)])
    model.compile("sgd", "mse")
    counts = [values(layer)]
    model.predict(normal(BATCH, 5), verbose=0)
    counts.append(values(layer))
    assert_same(*counts, rtol=0, atol=0)
    model.fit(normal(BATCH, 5), normal(BATCH, 5), verbose=0)
    moved = [
        variable.path
        for variable, before in zip(layer.variables, counts[0], strict=True)
        if not variable.trainable and np.any(variable.numpy() != before)
    ]
    assert moved


@pytest.mark.parametrize("functional_model", [False, True])
def test_masks_pass_from_keras_2_to_keras_3_and_back(functional_model):
    ids = tokens()
    embedding = tf_keras.layers.Embedding(7, 4, mask_zero=True)
    chain = [
        embedding,
        KerasBridge(keras.layers.Dense(3)),
        KerasBridge(keras.layers.Dropout(0.1)),
        tf_keras.layers.GlobalAveragePooling1D(),
    ]
    if functional_model:
        model = tf_keras.Sequential([tf_keras.Input((5,), dtype="int32"), *chain])
        outputs = model(ids)
    else:
        outputs = ids
        for layer in chain:
            outputs = layer(outputs)
    dense = chain[1].layer
    hidden = dense(embedding.embeddings.numpy()[ids]).numpy()
    np.testing.assert_allclose(outputs, hidden[:, :3].mean(axis=1), rtol=RTOL, atol=ATOL)


def test_a_keras_3_layer_may_make_and_stop_a_mask():
    embedding = KerasBridge(keras.layers.Embedding(7, 4, mask_zero=True))
    hidden = embedding(tokens())
    np.testing.assert_array_equal(hidden._keras_mask, tokens() != 0)
    pooled = KerasBridge(keras.layers.GlobalAveragePooling1D())(hidden)
    np.testing.assert_allclose(pooled, hidden[:, :3].numpy().mean(axis=1), rtol=RTOL, atol=ATOL)
    assert getattr(pooled, "_keras_mask", None) is None


def test_a_layer_that_knows_no_masks_stops_them_as_in_keras_3():
    inputs = tf.zeros((1, 2))
    inputs._keras_mask = tf.constant([[True, False]])
    with pytest.warns(UserWarning, match="does not support masking"):
        outputs = KerasBridge(TrainingProbe())(inputs)
    assert getattr(outputs, "_keras_mask", None) is None


def test_explicit_and_nested_masks():
    pooling = KerasBridge(keras.layers.GlobalAveragePooling1D())
    inputs = tf.constant(normal(2, 4, 3))
    mask = tf.constant([[True, False, False, False]] * 2)
    np.testing.assert_allclose(pooling(inputs, mask=mask), inputs[:, 0], rtol=RTOL)
    assert getattr(inputs, "_keras_mask", None) is None
    np.testing.assert_array_equal(pooling.compute_mask(inputs, mask) is None, True)

    add = KerasBridge(keras.layers.Add())
    both = tf.constant([[True, True, False, False]] * 2)
    np.testing.assert_array_equal(
        add([inputs, inputs], mask=[mask, both])._keras_mask,
        keras.layers.Add().compute_mask([inputs, inputs], [mask, both]),
    )
    with pytest.raises(ValueError, match=r"must have the structure of `inputs`.*1 masks for 2"):
        add([inputs, inputs], mask=mask)


@keras.saving.register_keras_serializable(package="bridge_tests")
class MaskedSum(keras.layers.Layer):
    """Two tensors and a mask, which Keras 3 passes on only if it is given by name."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.supports_masking = True

    def call(self, inputs, other, mask=None):
        return (inputs + other) * keras.ops.cast(mask, "float32")


def test_an_explicit_mask_reaches_a_layer_of_several_tensors():
    mask = tf.constant([[True, False]])
    outputs = KerasBridge(MaskedSum())(tf.ones((1, 2)), tf.ones((1, 2)), mask=mask)
    np.testing.assert_array_equal(outputs, [[2.0, 0.0]])


# --- losses --------------------------------------------------------------------------------------


@pytest.mark.parametrize("graph", [False, True])
def test_losses_are_those_of_the_last_step(graph):
    layer = build(LossLayer(), normal(BATCH, 4))
    bridge = KerasBridge(layer)

    def losses(inputs):
        bridge(inputs, training=True)
        return list(bridge.losses)

    step = tf.function(losses) if graph else losses
    for seed in range(3):
        inputs = tf.constant(normal(BATCH, 4, seed=seed))
        actual = step(inputs)
        layer(inputs, training=True)
        assert len(actual) == 3
        np.testing.assert_allclose(sorted(actual), sorted(map(float, layer.losses)), rtol=RTOL)


def test_weight_regularizers_count_once_when_a_layer_is_called_twice():
    layer = build(LossLayer(), normal(BATCH, 4))

    class Twice(tf_keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.bridge = KerasBridge(layer)

        def call(self, inputs):
            return self.bridge(inputs) + self.bridge(inputs)

    twice = Twice()
    twice(normal(BATCH, 4))
    assert len(twice.losses) == 2 + 2 + 1
    twice.trainable = False
    assert len(twice.losses) == 4  # Keras 3 does not regularize frozen weights


# --- saving --------------------------------------------------------------------------------------

SAVED = [case for case in CASES if case.name in ("nested", "functional", "masked", "switch_ffn")]


def bridge_net(case, steps=0):
    """A net whose automatic Keras 3 names differ from those of the net before."""
    keras.layers.Dense(1)
    net = BridgeNet(case.make())
    net.compile(OPTIMIZERS["adam"][1].from_config(OPTIMIZERS["adam"][1].get_config()), "mse")
    targets = normal(*net(case.inputs).shape, seed=2)
    for _ in range(steps):
        net.train_on_batch(case.inputs, targets)
    return net


@pytest.mark.parametrize("case", SAVED, ids=str)
@pytest.mark.parametrize("suffix", ["", ".weights.h5", ".h5"])
def test_weights_reload_exactly(case, suffix, tmp_path):
    trained, fresh = bridge_net(case, steps=1), bridge_net(case)
    trained.save_weights(str(tmp_path / "net") + suffix)
    fresh.load_weights(str(tmp_path / "net") + suffix)
    layer = trained.bridge.layer
    if suffix == ".h5":  # holds what Keras 2 calls weights: no seed states
        assert_same(fresh.get_weights(), trained.get_weights(), rtol=0, atol=0)
        names = [weight.name for weight in trained.bridge.weights]
        assert len(set(names)) == len(names)
    else:
        assert_same(values(fresh.bridge.layer), values(layer), rtol=0, atol=0)
    np.testing.assert_array_equal(fresh(case.inputs), trained(case.inputs))


def test_a_tensorflow_checkpoint_waits_for_the_first_call(tmp_path):
    case = SAVED[0]
    trained = bridge_net(case, steps=1)
    trained.save_weights(str(tmp_path / "net"))
    fresh = BridgeNet(case.make())
    fresh.load_weights(str(tmp_path / "net"))
    np.testing.assert_array_equal(fresh(case.inputs), trained(case.inputs))
    assert_same(values(fresh.bridge.layer), values(trained.bridge.layer), rtol=0, atol=0)


@pytest.mark.parametrize("case", SAVED, ids=str)
def test_training_goes_on_from_a_checkpoint(case, tmp_path):
    trained, fresh = bridge_net(case, steps=1), bridge_net(case, steps=0)
    path = tf.train.Checkpoint(model=trained, optimizer=trained.optimizer).save(tmp_path / "at")
    status = tf.train.Checkpoint(model=fresh, optimizer=fresh.optimizer).restore(path)
    targets = normal(*fresh(case.inputs).shape, seed=2)
    for net in (trained, fresh):
        net.train_on_batch(case.inputs, targets)
    status.assert_existing_objects_matched()
    assert_same(values(fresh.bridge.layer), values(trained.bridge.layer))


def test_weights_of_another_layer_are_refused(tmp_path):
    path = str(tmp_path / "net.weights.h5")
    bridge_net(CASES[0]).save_weights(path)
    with pytest.raises(ValueError, match=r"must hold the layer that was saved.*2 saved variables"):
        bridge_net(SAVED[0]).load_weights(path)


@keras.saving.register_keras_serializable(package="bridge_tests")
class LateLayer(keras.layers.Layer):
    """Makes a variable in training only."""

    def build(self, input_shape):
        self.late = keras.layers.Dense(2)

    def call(self, inputs, training=None):
        return self.late(inputs) if training else inputs


def test_variables_made_after_the_first_call_are_refused():
    bridge = KerasBridge(LateLayer())
    bridge(normal(2, 2))
    with pytest.raises(RuntimeError, match=r"made variables after its first call.*2 variables, 0"):
        bridge(normal(2, 2), training=True)


@keras.saving.register_keras_serializable(package="bridge_tests")
class MetricLayer(keras.layers.Layer):
    """Owns a metric, whose variables Keras 3 lists apart."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.seen = keras.metrics.Sum(name="seen")

    def call(self, inputs):
        self.seen.update_state(inputs)
        return inputs


def test_a_layer_that_owns_a_metric_is_exported(tmp_path):
    bridge = KerasBridge(MetricLayer())
    model = tf_keras.Sequential([tf_keras.Input((2,)), bridge])
    model.predict(np.ones((3, 2)), verbose=0)
    assert bridge.layer.seen.result() == 6.0
    assert bridge.weights == []
    tf.saved_model.save(model, tmp_path)
    outputs = tf.saved_model.load(tmp_path).signatures["serving_default"](tf.ones((1, 2)))
    np.testing.assert_array_equal(next(iter(outputs.values())), [[1.0, 1.0]])


def functional_keras_2(case):
    inputs = tf.nest.map_structure(
        lambda x: tf_keras.Input(x.shape[1:], dtype=x.dtype.name), case.inputs
    )
    outputs = tf.nest.flatten(KerasBridge(case.make())(inputs))
    return tf_keras.Model(inputs, [tf_keras.layers.Dense(2)(output) for output in outputs])


@pytest.mark.filterwarnings("ignore:You are saving your model as an HDF5 file:UserWarning")
@pytest.mark.filterwarnings("ignore:.*does not have a `build..` method:UserWarning")
@pytest.mark.parametrize("case", SAVED, ids=str)
@pytest.mark.parametrize("suffix", [".keras", "", ".h5"])
def test_a_keras_2_model_reloads_from_its_configuration(case, suffix, tmp_path):
    model = functional_keras_2(case)
    path = str(tmp_path / "model") + suffix
    model.save(path)
    loaded = tf_keras.models.load_model(path)
    bridges = [layer for layer in loaded.layers if isinstance(layer, KerasBridge)]
    assert len(bridges) == 1
    assert_same(loaded.predict(case.inputs, verbose=0), model.predict(case.inputs, verbose=0))
    clone = tf_keras.models.clone_model(model)
    assert clone.count_params() == model.count_params()


def test_the_configuration_keeps_frozen_sublayers_and_name():
    layer = build(sequential(), normal(BATCH, 4))
    layer.layers[0].trainable = False
    bridge = KerasBridge(layer, name="experts")
    config = bridge.get_config()
    copy = KerasBridge.from_config(config)
    assert copy.get_config() == config
    assert copy.name == "experts" and len(copy.trainable_weights) == len(bridge.trainable_weights)
    assert tf_keras.saving.get_registered_name(KerasBridge) == "keras_moe>KerasBridge"


# --- tfrs ----------------------------------------------------------------------------------------


class RatingModel(tfrs.Model):
    """Two embeddings, experts, one rating."""

    def __init__(self):
        super().__init__()
        self.user = tf_keras.layers.Embedding(20, 4)
        self.item = tf_keras.layers.Embedding(30, 4)
        self.mix = KerasBridge(layers.MoE(4, 8, seed=1))
        self.towers = KerasBridge(layers.MMoE(4, [8], ["rating"], dropout=0.1, seed=1))
        self.rating = tf_keras.layers.Dense(1)
        self.task = tfrs.tasks.Ranking(
            loss=tf_keras.losses.MeanSquaredError(),
            metrics=[tf_keras.metrics.RootMeanSquaredError("rmse")],
        )

    def call(self, features, training=None):
        hidden = tf.concat([self.user(features["user"]), self.item(features["item"])], axis=-1)
        return self.rating(self.towers(self.mix(hidden))["rating"])

    def compute_loss(self, inputs, training=False):
        features, ratings = inputs
        return self.task(labels=ratings, predictions=self(features, training=training))


def ratings(size=256):
    random = np.random.default_rng(0)
    user, item = random.integers(0, 20, size), random.integers(0, 30, size)
    features = {"user": user.astype("int32"), "item": item.astype("int32")}
    return features, (0.1 * user + 0.05 * item - 1.5).astype("float32")[:, None]


@pytest.fixture(scope="module")
def rating_model():
    keras.utils.set_random_seed(0)
    tf_keras.utils.set_random_seed(0)
    model = RatingModel()
    model.compile(tf_keras.optimizers.Adam(0.02))
    data = tf.data.Dataset.from_tensor_slices(ratings()).batch(32)
    return model, model.fit(data, epochs=2, verbose=0).history


def test_a_tfrs_model_trains(rating_model):
    _, history = rating_model
    assert history["rmse"][1] < 0.8 * history["rmse"][0]
    # The balance loss is near its minimum of 0.01: no step adds to the one before.
    assert 0.005 < history["regularization_loss"][1] < 0.1
    np.testing.assert_allclose(
        history["total_loss"], np.add(history["loss"], history["regularization_loss"]), rtol=RTOL
    )


FRESH_WEIGHTS = """
import sys
sys.path.insert(0, "tests/integrations")
import keras, numpy as np
keras.layers.Dense(1), keras.layers.Dense(1)
from test_tfrs import RatingModel, ratings
model = RatingModel()
features, _ = ratings()
model(features)
model.load_weights(sys.argv[1])
np.save(sys.argv[2], model(features).numpy())
"""

FRESH_SERVING = """
import sys
import numpy as np, tensorflow as tf
signature = tf.saved_model.load(sys.argv[1]).signatures["serving_default"]
with np.load(sys.argv[2]) as features:
    outputs = signature(**{name: tf.constant(features[name]) for name in features})
assert "keras_moe" not in sys.modules
np.save(sys.argv[3], list(outputs.values())[0].numpy())
"""


@pytest.mark.parametrize("suffix", ["", ".weights.h5"])
def test_weights_reload_in_a_fresh_process(rating_model, suffix, tmp_path):
    model, _ = rating_model
    features, _ = ratings()
    path, result = str(tmp_path / "model") + suffix, str(tmp_path / "outputs.npy")
    model.save_weights(path)
    run_python(FRESH_WEIGHTS, path, result)
    assert_same([np.load(result)], [model(features)])


@pytest.mark.parametrize("how", ["saved_model", "export", "save"])
def test_an_exported_model_serves_in_a_fresh_process(rating_model, how, tmp_path):
    model, _ = rating_model
    features, _ = ratings(7)
    path, result = str(tmp_path / "model"), str(tmp_path / "outputs.npy")
    {
        "saved_model": lambda: tf.saved_model.save(model, path),
        "export": lambda: model.export(path),
        "save": lambda: model.save(path),
    }[how]()
    np.savez(tmp_path / "features.npz", **features)
    run_python(FRESH_SERVING, path, str(tmp_path / "features.npz"), result)
    assert_same([np.load(result)], [model(features)])


# --- mixed precision -----------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16", "float64"])
def test_the_dtype_policy_of_the_keras_3_layer_governs(policy):
    bridge = KerasBridge(keras.layers.Dense(3, dtype=policy, activity_regularizer="l2"))
    outputs = bridge(normal(BATCH, 4))
    assert outputs.dtype.name == bridge.layer.compute_dtype
    assert bridge.weights[0].dtype.name == bridge.layer.variable_dtype
    assert bridge.losses[0].dtype == tf.float32
    model = tf_keras.Sequential([bridge, tf_keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    before = bridge.get_weights()
    model.fit(normal(BATCH, 4), normal(BATCH, 1), verbose=0)
    assert np.any(bridge.get_weights()[0] != before[0])


def test_the_dtype_policy_of_keras_2_does_not_reach_the_keras_3_layer():
    bridge = KerasBridge(keras.layers.Dense(3), dtype="mixed_float16")
    inputs = tf.constant(normal(BATCH, 4))
    assert bridge(inputs).dtype == tf.float32
    np.testing.assert_array_equal(bridge(inputs), bridge.layer(inputs))


# --- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (tf_keras.layers.Dense(1), r"not of Keras 2.*Received: layer=<tf_keras"),
        (keras.layers.Dense, r"of Keras 3 \(`keras.Layer`\)\. Received: layer=<class"),
        (None, r"Received: layer=None"),
    ],
)
def test_what_is_no_keras_3_layer_is_refused(layer, message):
    with pytest.raises(TypeError, match=message):
        KerasBridge(layer)


IMPORT = "from keras_moe.integrations.tfrs import KerasBridge"


@pytest.mark.parametrize(
    ("code", "environment", "message"),
    [
        (IMPORT, {"TF_USE_LEGACY_KERAS": None}, "TF_USE_LEGACY_KERAS=1 before tensorflow is first"),
        (IMPORT, {"KERAS_BACKEND": "jax"}, "KERAS_BACKEND=tensorflow before keras is first"),
        (
            f"import sys; sys.modules['tf_keras'] = None; {IMPORT}",
            {},
            'pip install ".[tfrs]"',
        ),
        (
            "import os, tensorflow as tf; tf.keras.version\n"
            f"os.environ['TF_USE_LEGACY_KERAS'] = '1'; {IMPORT}",
            {"TF_USE_LEGACY_KERAS": None},
            "`tf.keras` was loaded as Keras 3 before",
        ),
    ],
    ids=["legacy", "backend", "missing", "late"],
)
def test_a_wrong_environment_is_named(code, environment, message):
    with pytest.raises(AssertionError) as error:
        run_python(code, **environment)
    assert "ImportError" in str(error.value) and message in str(error.value)


def test_importing_the_package_imports_no_tensorflow():
    code = "import sys, keras_moe.integrations; assert 'tensorflow' not in sys.modules"
    run_python(code, KERAS_BACKEND="jax", TF_USE_LEGACY_KERAS=None)


def test_the_example_of_the_guide_runs(tmp_path):
    page = (Path(__file__).parents[2] / "docs" / "tfrs_bridge.md").read_text()
    code = page.split("```python\n")[1].split("```")[0].replace('"ranker"', repr(str(tmp_path)))
    run_python(code, TF_USE_LEGACY_KERAS=None, KERAS_BACKEND=None)
    assert (tmp_path / "saved_model.pb").exists()


def test_constraints_are_applied_by_keras_2_optimizers():
    bridge = KerasBridge(keras.layers.Dense(4, kernel_constraint=keras.constraints.UnitNorm()))
    model = tf_keras.Sequential([bridge])
    model.compile(tf_keras.optimizers.SGD(0.1), "mse")
    x = np.random.default_rng(0).normal(size=(8, 3)).astype("float32")
    model.fit(x, x[:, :1] * np.ones((1, 4), "float32"), verbose=0)
    norms = np.linalg.norm(bridge.layer.kernel.numpy(), axis=0)
    np.testing.assert_allclose(norms, 1.0, rtol=1e-5)
