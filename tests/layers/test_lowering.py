"""Every layer and dispatcher compiles for TPU and CUDA, both ways, without the hardware."""

import keras
import pytest

from keras_moe import layers

CASES = {
    "walk": lambda: layers.MoE(8, 16, dispatch="walk"),
    "walk_glu": lambda: layers.MoE(8, 16, experts="glu", dropout=0.1, dispatch="walk"),
    "grouped": lambda: layers.MoE(8, 16, dispatch="grouped"),
    "capacity": lambda: layers.MoE(8, 16, capacity_factor=1.25),
    "einsum": lambda: layers.MoE(8, 16, capacity_factor=1.25, dispatch="einsum"),
    "dense": lambda: layers.MoE(8, 16, router="dense"),
    "lookup": lambda: layers.MoE(8, 16, dispatch="lookup"),
    "layers_as_experts": lambda: layers.MoE(4, experts=keras.layers.Dense(16)),
    "switch": lambda: layers.SwitchFFN(8, 16),
    "soft": lambda: layers.SoftMoE(8, 16),
    "causal": lambda: layers.SoftMoE(4, 16, causal=True),
    "mmoe": lambda: layers.MMoE(4, [16, 8], 2),
}


@pytest.mark.skipif(keras.backend.backend() != "jax", reason="JAX compiles for other platforms")
@pytest.mark.parametrize("dtype", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_lowers_for_tpu_and_cuda(make, dtype):
    import jax
    import jax.numpy as jnp

    policy = keras.config.dtype_policy()
    keras.config.set_dtype_policy(dtype)
    try:
        layer = make()
        layer.build((2, 24, 16))
    finally:
        keras.config.set_dtype_policy(policy)
    weights = [v.value for v in layer.trainable_variables]
    others = [v.value for v in layer.non_trainable_variables]

    def forward(weights, x):
        return layer.stateless_call(weights, others, x, training=False)[0]

    def loss(weights, x):
        outputs, _, losses = layer.stateless_call(
            weights, others, x, training=True, return_losses=True
        )
        squares = [jnp.sum(y.astype("float32") ** 2) for y in jax.tree.leaves(outputs)]
        return sum(squares) + sum(losses)

    x = jax.ShapeDtypeStruct((2, 24, 16), "float32")
    shapes = [jax.ShapeDtypeStruct(w.shape, w.dtype) for w in weights]
    for function in (forward, jax.grad(loss, (0, 1))):
        exported = jax.export.export(jax.jit(function), platforms=("tpu", "cuda"))(shapes, x)
        assert exported.platforms == ("tpu", "cuda")
