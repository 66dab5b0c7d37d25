"""Corners that a review found, each a fault once."""

import keras
import numpy as np
import pytest

from keras_moe import layers
from keras_moe.core.constraints import PerExpertConstraint
from tests.contract import D, arrays, run, tokens


def test_example_level_pools_in_float32():
    """2,000 tokens of 60 sum to 120,000, which float16 has not."""
    layer = layers.MoE(4, 8, routing_level="example", dtype="mixed_float16")
    x = np.full((1, 2000, D), 60.0, "float32")
    _, routing = run(layer, x, mask=np.ones((1, 2000), "bool"), return_routing=True)
    assert np.isfinite(arrays(routing.logits)[0]).all()


def test_dense_dispatcher_keeps_a_broken_expert_to_its_tokens():
    layer = layers.MoE(2, 8, top_k=1, dispatch="dense")
    layer.build((None, D))
    kernel = arrays(layer.experts.weights[0].value)[0].copy()
    kernel[1] = np.inf
    layer.experts.weights[0].assign(kernel)
    x = tokens(1, 30)[0]
    outputs, routing = run(layer, x, return_routing=True)
    chosen = arrays(routing.experts)[0][:, 0]
    assert set(chosen) == {0, 1}
    assert np.isfinite(arrays(outputs)[0][chosen == 0]).all()


@pytest.mark.parametrize(
    "make",
    [
        lambda **kw: layers.MoE(4, 8, **kw),
        lambda **kw: layers.SoftMoE(4, 8, **kw),
        lambda **kw: layers.MMoE(4, [8], 2, **kw),
    ],
)
def test_constraints_hold_for_each_expert(make):
    """`UnitNorm(axis=0)` is over one expert's inputs, as in Dense, not over the experts."""
    layer = make(kernel_constraint=keras.constraints.UnitNorm(axis=0))
    inputs = keras.Input((3, D))
    outputs = keras.tree.flatten(layer(inputs))
    model = keras.Model(inputs, outputs[0])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    x = tokens(4, 3)
    model.fit(x, np.zeros((4, 3, outputs[0].shape[-1]), "float32"), verbose=0)
    kernels = [w for w in layer.trainable_weights if "experts/kernel" in w.path]
    assert kernels
    for kernel in kernels:
        norms = np.linalg.norm(arrays(kernel.value)[0], axis=1)
        np.testing.assert_allclose(norms, 1.0, rtol=1e-4)


def test_constraint_round_trip():
    constraint = PerExpertConstraint("non_neg")
    again = PerExpertConstraint.from_config(constraint.get_config())
    np.testing.assert_array_equal(arrays(again(np.array([[-1.0, 2.0]])))[0], [[0.0, 2.0]])


@keras.saving.register_keras_serializable(package="keras_moe_tests")
class Doubled(keras.initializers.Initializer):
    """Wraps another initializer, whose seed is one level down in the config."""

    def __init__(self, base):
        self.base = keras.initializers.get(base)

    def __call__(self, shape, dtype=None):
        return 2 * self.base(shape, dtype=dtype)

    def get_config(self):
        return {"base": keras.initializers.serialize(self.base)}


def test_a_seed_inside_an_initializer_does_not_make_experts_equal():
    initializer = Doubled(keras.initializers.RandomNormal(seed=1))
    layer = layers.MoE(3, 8, kernel_initializer=initializer)
    layer.build((None, D))
    kernel = arrays(layer.experts.weights[0].value)[0]
    assert np.abs(kernel[0] - kernel[1]).max() > 1e-3


def test_a_mask_may_be_a_list():
    layer, x = layers.MoE(4, 8), tokens(1, 3)
    outputs = arrays(layer(x, mask=[[True, True, False]]))[0]
    assert (outputs[0, 2] == 0).all() and (outputs[0, :2] != 0).any()


@pytest.mark.parametrize("count", [64, 4096])
def test_copied_weights_do_not_grow_with_the_tokens(count):
    """Blocks take weights a bounded number of times, whatever the batch."""
    from keras_moe.dispatch.padded_blocks import PaddedBlocksDispatcher, blocks_needed

    for num_experts in (4, 32):
        total = 2 * count * num_experts
        rows = PaddedBlocksDispatcher().rows_per_block(total, num_experts)
        blocks = blocks_needed(total, num_experts, rows)
        assert blocks <= 6 * num_experts
        assert rows * blocks <= 1.26 * total


def test_dispatch_plan_tells_dispatcher_overhead_and_reason():
    free, dense = layers.MoE(8, 64), layers.MoE(4, 64, top_k=4)
    bounded = layers.MoE(8, 64, capacity_factor=1.25)
    assert free.dispatch_plan(4096).dispatcher == "walk"
    assert 1.0 < free.dispatch_plan(4096).overhead < 1.3 < 8 / 2
    assert dense.dispatch_plan(4096).dispatcher == "dense"
    assert dense.dispatch_plan(4096).overhead == pytest.approx(1)
    walks = keras.backend.backend() == "torch"  # whose walk beats slots at any size
    assert bounded.dispatch_plan(4096).dispatcher == ("walk" if walks else "slots")
    assert bounded.dispatch_plan(4096).overhead == pytest.approx(1.25)
    assert ("rows it keeps" if walks else "slots in all") in bounded.dispatch_plan(4096).reason
    assert layers.MoE(8, 64, dispatch="walk").dispatch_plan(8).reason.startswith("asked for")


MIXTURES = {
    "moe": lambda **kw: layers.MoE(4, 8, **kw),
    "soft": lambda **kw: layers.SoftMoE(4, 8, **kw),
    "mmoe": lambda **kw: layers.MMoE(4, [8], 2, **kw),
}
mixtures = pytest.mark.parametrize("make", MIXTURES.values(), ids=MIXTURES.keys())


@mixtures
def test_a_token_that_is_not_finite_is_not_counted(make):
    layer, x = make(), tokens(3, 4)
    others = x.reshape(12, 1, D)[1:]  # what a router says of a token does not depend on the rest
    run(layer, others, training=True)
    expected = layer.running_counts()
    layer.reset_running_counts()
    x[0, 0] = np.nan
    run(layer, x, training=True)
    counts = layer.running_counts()
    assert counts["decisions"] == expected["decisions"] == 11
    np.testing.assert_allclose(counts["entropy"], expected["entropy"], rtol=1e-5)
    if "importance" in counts:
        np.testing.assert_allclose(counts["importance"], expected["importance"], rtol=1e-5)


@mixtures
def test_another_width_fails_as_keras_layers_do(make):
    layer = make()
    layer.build((None, 3, D))
    with pytest.raises(ValueError, match=f"expected axis -1 of input shape to have value {D}"):
        layer(np.zeros((2, 3, D + 1), "float32"))


def test_a_frozen_layer_adds_no_losses():
    layer = layers.MoE(4, 8)
    run(layer, tokens())
    assert len(layer.losses) == 2
    frozen = layers.MoE(4, 8)
    frozen.trainable = False
    run(frozen, tokens())
    assert len(frozen.losses) == 0
