"""`logits` is all that a router's scores come from: cosines, a temperature, an earlier choice."""

import numpy as np
import pytest
from keras import ops

from keras_moe import layers, routers
from tests import helpers

pytestmark = pytest.mark.one_backend("which method a router calls")

N, D, E = 9, 4, 6
RULES = {
    "TopKRouter": {"top_k": 2},
    "SwitchRouter": {},
    "NoisyTopKRouter": {"top_k": 2},
    "BatchPriorityRouter": {"top_k": 2},
    "NoTokenLeftRouter": {"top_k": 2, "capacity_factor": 0.7},
    "SigmoidBiasRouter": {"top_k": 2},
    "SinkhornRouter": {"top_k": 2},
    "ExpertChoiceRouter": {"top_k": 2},
    "ReLURouter": {"top_k": 2},
    "DenseRouter": {},
}


def cosine(rule):
    class Cosine(rule):
        """logits = temperature * cos(x, column of the kernel)."""

        def build(self, input_shape):
            super().build(input_shape)
            self.temperature = self.add_weight(name="temperature", shape=(), initializer="ones")
            self.seen = []

        def logits(self, inputs):
            self.seen.append(inputs)
            rows, columns = (
                v * ops.rsqrt(ops.sum(ops.square(v), axis=axis, keepdims=True) + 1e-6)
                for v, axis in ((inputs, -1), (ops.convert_to_tensor(self.kernel), 0))
            )
            return self.temperature * ops.matmul(rows, columns)

    return Cosine


def made(name, rule=None, width=D, **more):
    rule = getattr(routers, name) if rule is None else rule
    losses = dict.fromkeys(rule.LOSSES, 0.5)
    router = rule(E, losses=losses, seed=3, **{**RULES[name], "jitter": 0.0, **more})
    router.build((None, width))
    helpers.randomize_weights(router)
    return router


def scores_of(router, x):
    kernel = ops.convert_to_numpy(router.kernel).astype("float64")
    x, temperature = x.astype("float64"), float(ops.convert_to_numpy(router.temperature))
    lengths = [np.sqrt((v**2).sum(axis=a, keepdims=True) + 1e-6) for v, a in ((x, -1), (kernel, 0))]
    return temperature * (x / lengths[0]) @ (kernel / lengths[1])


@pytest.mark.parametrize("training", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("name", RULES)
def test_choices_weights_and_losses_follow_it(name, training):
    """As a plain router's that reads the scores themselves, with masks and three sequences."""
    router = made(name, cosine(getattr(routers, name)))
    router.temperature.assign(3.0)
    plain = made(name, width=E)
    plain.kernel.assign(np.eye(E))
    for each in (router, plain):
        if hasattr(each, "noise_kernel"):
            each.noise_kernel.assign(np.zeros(each.noise_kernel.shape))
    x = np.random.default_rng(0).normal(size=(N, D)).astype("float32")
    mask = np.arange(N) % 4 != 1
    call = {"training": training, "mask": mask, "num_sequences": 3}
    found, _ = helpers.call(router, x, **call)
    expected, _ = helpers.call(plain, scores_of(router, x).astype("float32"), **call)
    np.testing.assert_array_equal(found.kept, expected.kept)
    np.testing.assert_array_equal(found.experts[mask], expected.experts[mask])
    helpers.assert_close(found.weights[mask], expected.weights[mask], "weights")
    helpers.assert_all_close(found.losses, expected.losses)


@pytest.mark.parametrize("name", RULES)
def test_it_learns_and_keeps_the_jitter(name):
    rule = cosine(getattr(routers, name))
    router = made(name, rule, jitter=0.5)
    x = np.ones((N, D), "float32")
    router(x, training=True)
    (seen,) = (ops.convert_to_numpy(each) for each in router.seen)
    assert 0.5 <= seen.min() < 0.8 < 1.2 < seen.max() <= 1.5
    router.seen.clear()
    router(x, training=False)
    np.testing.assert_array_equal(ops.convert_to_numpy(router.seen[0]), x)
    layer = layers.MoE(E, 5, router=made_again(rule, name))
    layer.build((None, D))
    helpers.randomize_weights(layer)
    x = np.random.default_rng(0).normal(size=(N, D)).astype("float32")
    gradients = helpers.values_and_gradients(layer, x, np.ones_like(x), training=True)[2]
    assert np.abs(gradients["router/temperature"]) > 0
    assert np.abs(gradients["router/kernel"]).max() > 0


def made_again(rule, name):
    return rule(E, seed=3, **{**RULES[name], "jitter": 0.5})


def after_a_choice(rule):
    class AfterAChoice(rule):
        """logits = x W + transition[the token's expert in an earlier layer]."""

        needs_token_ids = True

        def build(self, input_shape):
            super().build(input_shape)
            self.transition = self.add_weight(name="transition", shape=(3, E))

        def logits(self, inputs, token_ids=None):
            return super().logits(inputs) + ops.take(self.transition, token_ids, axis=0)

    return AfterAChoice


@pytest.mark.parametrize("name", RULES)
def test_it_reads_the_choice_of_an_earlier_layer(name):
    rule = after_a_choice(getattr(routers, name))
    layer = layers.MoE(E, 5, router=rule(E, **{**RULES[name], "jitter": 0.0}))
    first = layers.MoE(3, 5, top_k=1)
    for each in (first, layer):
        each.build((None, 5, D))
        helpers.randomize_weights(each)
    x = np.random.default_rng(0).normal(size=(2, 5, D)).astype("float32")
    (_, earlier), _ = helpers.call(first, x, return_routing=True)
    ids = earlier.experts[..., 0]
    assert len(set(ids.ravel())) > 1
    (_, routing), _ = helpers.call(layer, x, token_ids=ids, return_routing=True)
    weights = helpers.weights_of(layer)
    helpers.assert_close(
        routing.logits, x @ weights["router/kernel"] + weights["router/transition"][ids], "logits"
    )


def test_selectors_of_dselect_k():
    class Shifted(routers.DSelectKRouter):
        def selectors(self, inputs):
            z, alpha = super().selectors(inputs)
            return z + 10.0, alpha

    router = Shifted(8, 2)
    router.build((None, D))
    routing, _ = helpers.call(router, np.ones((2, D), "float32"))
    np.testing.assert_allclose(routing.weights, np.eye(8)[[7, 7]], atol=1e-6)


@pytest.mark.every_backend
def test_a_temperature_that_falls_in_training():
    """What changes from batch to batch is a weight that `adapt` changes."""

    class Annealed(routers.TopKRouter):
        def build(self, input_shape):
            super().build(input_shape)
            self.temperature = self.add_weight(
                name="temperature", shape=(), initializer="ones", trainable=False
            )

        def logits(self, inputs):
            return super().logits(inputs) / self.temperature

        def adapt(self, routing):
            self.temperature.assign(0.5 * self.temperature)

    router = Annealed(E)
    router.build((None, D))
    x = np.ones((2, D), "float32")
    before, _ = helpers.call(router, x, training=True)
    after, _ = helpers.call(router, x, training=False)
    helpers.assert_close(after.logits, 2.0 * before.logits, "logits")


def test_logits_of_dselect_k_are_not_overridden():
    class Wrong(routers.DSelectKRouter):
        def logits(self, inputs):
            return inputs

    with pytest.raises(ValueError, match="must override `selectors` in place of `logits`"):
        Wrong(8)
