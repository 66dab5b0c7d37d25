"""The references do the work that they are said to do."""

import math

import numpy as np

from benchmarks import ours, references
from benchmarks.rows import Sizes
from keras_moe.layers import MMoE

SIZES = Sizes(tokens=8, width=16, hidden=32, experts=4, top_k=2)


def multiplications(layer):
    """Of one token through dense layers: one per entry of a kernel."""
    return sum(math.prod(v.shape) for v in layer.trainable_variables if len(v.shape) == 2)


def test_the_dense_layer_has_the_active_weights_of_the_mixture():
    dense = references.dense_ffn(SIZES.width, SIZES.top_k * SIZES.hidden)
    experts = [v for v in ours.moe(SIZES).trainable_variables if len(v.shape) == 3]
    active = sum(math.prod(v.shape) for v in experts) * SIZES.top_k / SIZES.experts
    assert multiplications(dense) == active


def test_the_gated_layer_too():
    gated = references.gated_ffn(SIZES.width, SIZES.top_k * SIZES.hidden)
    experts = [v for v in ours.glu_moe(SIZES).trainable_variables if len(v.shape) == 3]
    active = sum(math.prod(v.shape) for v in experts) * SIZES.top_k / SIZES.experts
    assert multiplications(gated) == active


def test_the_loop_computes_mmoe():
    width, experts, units, tasks = 6, 3, (8, 4), 2
    layer, loop = MMoE(experts, units, tasks), references.loop_mmoe(width, experts, units, tasks)
    layer.build((None, width))
    by_name = {v.path.removeprefix(f"{layer.name}/"): v for v in layer.trainable_variables}
    for e, stack in enumerate(loop.experts):
        for depth, dense in enumerate(stack.layers):
            dense.kernel.assign(by_name[f"experts/kernel_{depth}"][e])
    kernel = np.asarray(by_name["gates/kernel"].value)
    gate_axis = kernel.shape.index(tasks)
    for t, gate in enumerate(loop.gates):
        gate.kernel.assign(np.take(kernel, t, axis=gate_axis).reshape(width, experts))
    x = np.random.default_rng(0).normal(size=(5, width)).astype("float32")
    for actual, expected in zip(loop(x), layer(x), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_the_chain_has_the_flops_of_mmoe():
    width, experts, (first, last), tasks = 128, 8, (256, 128), 4
    chain = references.mmoe_chain(width, experts, (first, last), tasks)
    kernels = [math.prod(v.shape) for v in chain.trainable_variables if len(v.shape) == 2]
    # The second kernel is applied once per expert.
    multiplied = kernels[0] + experts * kernels[1] + kernels[2]
    of_experts = experts * (width * first + first * last)
    of_gates_and_sums = tasks * experts * (width + last)
    assert multiplied == of_experts + of_gates_and_sums
