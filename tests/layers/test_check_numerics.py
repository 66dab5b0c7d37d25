"""No layer and no router makes an infinity or a NaN on its way, which debuggers stop at.

`tf.debugging.enable_check_numerics` looks at what every operation gives, and JAX's `jax_debug_nans`
and `jax_debug_infs` at what every program gives. Both hold for a whole process.
"""

import os
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import layers, routers
from tests import helpers
from tests.helpers import some_everywhere
from tests.layers.test_contract import CASES

ROOT = Path(__file__).parents[2]
BACKEND = keras.backend.backend()
SIGMOID_GROUPS = {"num_groups": 2, "top_groups": 1}
MORE = {
    "groups": lambda: layers.MoE(4, 8, router=routers.SigmoidBiasRouter(4, 2, **SIGMOID_GROUPS)),
    "expert choice per example": lambda: layers.MoE(
        4, 8, router="expert_choice", capacity_group="example"
    ),
    "expert choice of inputs": lambda: layers.MoE(4, 8, router="expert_choice", weigh="inputs"),
    "einsum": lambda: layers.MoE(4, 8, capacity=2, dispatch="einsum"),
    "walk with a capacity": lambda: layers.MoE(4, 8, capacity=2, dispatch="walk"),
    "slots": lambda: layers.MoE(4, 8, capacity=2, dispatch="slots"),
    "lookup": lambda: layers.MoE(4, 8, dispatch="lookup"),
    "dense": lambda: layers.MoE(4, 8, dispatch="dense"),
    "one expert": lambda: layers.MoE(1, 8, top_k=1),
    "identity": lambda: layers.SoftMoE(4, 8, mixing="identity"),
    "token hash": lambda: layers.MoE(4, 8, router=routers.TokenHashRouter(4, 9)),
    "dropped gates": lambda: layers.MMoE(4, 8, 2, gate_dropout=0.5, seed=1),
    "sequences": lambda: layers.MoE(
        4,
        8,
        router=routers.NoisyTopKRouter(4, losses=dict.fromkeys(routers.NoisyTopKRouter.LOSSES, 1)),
    ),
}
MASKS = [
    np.array([[0, 0, 0, 0], [1, 0, 1, 0]], bool),
    np.array([[1, 1, 0, 0], [1, 1, 1, 1]], bool),
    np.zeros((2, 4), bool),
]


# Arithmetic of their own; other cases bring these to other dispatchers and experts.
THOROUGH = {
    *("moe", "moe_noisy_top_k", "moe_sigmoid_bias", "moe_expert_choice"),
    *("switch_ffn", "soft_moe_causal", "mmoe_list"),
}
COMPILED = ("moe", "moe_sigmoid_bias", "moe_expert_choice", "soft_moe")


def mixtures():
    return {**{name: case.make for name, case in CASES.items()}, **MORE}


def check(make, is_thorough=True):
    """Forward and backward: at inference, in training with masks, and with logits of any size."""
    layer = make()
    layer.build((None, 4, 6))
    helpers.randomize_weights(layer)
    more = {}
    if getattr(getattr(layer, "router", None), "needs_token_ids", False):
        more["token_ids"] = np.arange(8, dtype="int32").reshape(2, 4)
    x = np.random.default_rng(0).normal(size=(2, 4, 6)).astype("float32")
    calls = [(x, {"mask": MASKS[0]}, True)]
    if is_thorough:
        calls += [(x, {}, False)]
        calls += [(size * x, {}, True) for size in (0.0, 100.0)]
        calls += [(x, {"mask": mask}, True) for mask in MASKS[1:]]
    is_multi_gate = isinstance(layer, layers.MMoE)
    widths = [layer.expert_units[-1]] * layer.num_tasks if is_multi_gate else [6]
    for inputs, mask, training in calls:
        helpers.values_and_gradients(
            layer,
            inputs,
            [np.ones((2, 4, width), "float32") for width in widths],
            training=training,
            **more,
            **mask,
        )


def compiled(make):
    """A training step of a compiled `fit`, for any batch size."""
    inputs, layer = keras.Input((4, 6)), make()
    outputs = keras.tree.flatten(layer(inputs))
    model = keras.Model(inputs, keras.layers.Add()(outputs) if len(outputs) > 1 else outputs[0])
    model.compile("sgd", "mse", jit_compile=False)
    x = np.random.default_rng(0).normal(size=(4, 4, 6)).astype("float32")
    model.fit(x, np.zeros((4, 4, model.output_shape[-1])), batch_size=2, verbose=0)


def main():
    """All of them, in a process of its own: checks stay in programs that are traced."""
    import tensorflow as tf

    tf.debugging.enable_check_numerics()
    failed = []
    for name, make in mixtures().items():
        try:
            check(make, name in THOROUGH)
            if name in COMPILED:
                compiled(make)
        except Exception as error:
            failed.append(f"{name}: {type(error).__name__} {str(error)[:600]}")
    print("\n\n".join(failed) or "nothing was stopped")


@pytest.mark.skipif(BACKEND != "tensorflow", reason="a debugger of TensorFlow")
def test_nothing_is_stopped():
    run = subprocess.run(
        [sys.executable, "-m", "tests.layers.test_check_numerics"],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip().endswith("nothing was stopped"), run.stdout + run.stderr[-2000:]


@pytest.mark.skipif(BACKEND != "jax", reason="debuggers of JAX")
@pytest.mark.parametrize(
    "name", ["groups", "expert choice per example", "moe_dselect_k", "soft_moe_causal", "mmoe_list"]
)
def test_debuggers_of_jax_stop_at_nothing(name):
    import jax

    with jax.debug_nans(True), jax.debug_infs(True):
        check(mixtures()[name])


RULES = {
    "top_k": {"top_k": 2},
    "switch": {},
    "sigmoid_bias": {"top_k": 2, "num_groups": 2, "top_groups": 1},
    "noisy_top_k": {"top_k": 2},
    "batch_priority": {"top_k": 2},
    "no_token_left": {"top_k": 2, "capacity_factor": 2.0},
    "sinkhorn": {"top_k": 2},
    "expert_choice": {"top_k": 2},
    "relu": {"top_k": 2},
    "dense": {},
}


@pytest.mark.parametrize(
    "training",
    some_everywhere(
        {"inference": False, "training": True}, ["training"], "training has its logits, and noise"
    ),
)
@pytest.mark.parametrize("name", RULES)
def test_experts_that_a_user_rules_out(name, training):
    """A router of his own marks with -inf what a token must not choose: it has no weight, all
    gradients are finite, and the token is counted.
    """
    rule = type(routers.get(name, num_experts=4))

    class Masked(rule):
        def logits(self, inputs):
            is_open = ops.arange(4) > 0
            return ops.where(is_open, super().logits(inputs), -float("inf"))

    layer = layers.MoE(4, 8, router=Masked(4, **RULES[name]))
    layer.build((None, 6))
    helpers.randomize_weights(layer)
    x = np.random.default_rng(0).normal(size=(16, 6)).astype("float32")
    (outputs, routing), losses, gradients = helpers.values_and_gradients(
        layer,
        x,
        np.ones_like(x),
        lambda result: result[0],
        training=training,
        return_routing=True,
    )
    for array in (outputs, *losses, *gradients.values()):
        assert np.isfinite(array).all()
    np.testing.assert_array_equal(np.where(routing.experts == 0, routing.weights, 0.0), 0.0)
    if training:
        layer.reset_running_counts()
        helpers.call(layer, x, training=True)
        counts = layer.running_counts()
        assert counts["decisions"] == (routing.asked.any(axis=-1).sum() if name == "relu" else 16)
        assert 0 < counts["entropy"] / counts["decisions"] <= np.log(3.0) + 1e-5


if __name__ == "__main__":
    main()
