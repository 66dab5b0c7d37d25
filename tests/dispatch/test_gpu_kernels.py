"""JAX's grouped matmul for a GPU: its values without one, and that it compiles for one."""

import os
import types

import keras
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("these are kernels for JAX", allow_module_level=True)

import jax
import jax.numpy as jnp
from jax._src.lib import triton  # where JAX keeps the dialect, which it compiles with
from jax.interpreters import mlir
from jaxlib.mlir import ir

from keras_moe.dispatch import backend, choose, native
from keras_moe.dispatch.backend import jax_gpu
from keras_moe.layers import MoE

TRITON = "__gpu$xla.gpu.triton"
TOLERANCE = {"float32": 1e-6, "bfloat16": 8e-3, "float16": 1e-3}  # relative to the largest entry
# Ragged, empty, of no multiple of a block; rows behind the last expert's.
LOADS = {
    "ragged": ((37, 0, 91, 1, 0, 60, 3, 64), 0),
    "spare rows": ((5, 0, 7), 20),
    "one expert": ((0, 0, 9), 3),
    "no row": ((0, 0), 16),
    "long": ((300, 129), 1),
}


def by_groups(rows, kernel, ends):
    """rows[start:end] @ kernel[e] in float64."""
    values, start = np.zeros((rows.shape[0], kernel.shape[2])), 0
    for expert, end in enumerate(ends):
        values[start:end] = rows[start:end] @ kernel[expert]
        start = end
    return values


def sample(load, width, hidden, dtype):
    counts, spare = load
    rng = np.random.default_rng(0)
    ends = np.cumsum(counts).astype("int32")
    arrays = [
        rng.normal(size=(sum(counts) + spare, width)),
        rng.normal(size=(len(counts), width, hidden)),
        rng.normal(size=(sum(counts) + spare, hidden)),
    ]
    rows, kernel, upstream = [np.asarray(jnp.asarray(a, dtype), "float64") for a in arrays]
    tiling = jax_gpu.tiling(len(rows), len(ends), jnp.dtype(dtype).itemsize, interpret=True)
    return rows, kernel, upstream, ends, tiling


def assert_close(found, expected, tolerance):
    error = np.abs(np.asarray(found, "float64") - expected).max()
    assert error <= tolerance * max(np.abs(expected).max(), 1.0)


@pytest.mark.parametrize(
    ("load", "sizes", "dtype"),
    [
        ("ragged", (40, 24), "bfloat16"),
        ("ragged", (64, 300), "float32"),
        ("spare rows", (32, 48), "float16"),
        ("one expert", (5, 3), "float32"),
        ("no row", (8, 8), "float32"),
        ("long", (24, 40), "bfloat16"),
    ],
)
def test_values_and_gradients_are_those_of_each_group(load, sizes, dtype):
    rows, kernel, upstream, ends, tiling = sample(LOADS[load], *sizes, dtype)

    def product(rows, kernel):
        return jax_gpu.grouped_matmul(rows, kernel, jnp.asarray(ends), tiling)

    values, pullback = jax.vjp(product, jnp.asarray(rows, dtype), jnp.asarray(kernel, dtype))
    by_rows, by_kernel = pullback(jnp.asarray(upstream, dtype))
    assert values.dtype == by_rows.dtype == by_kernel.dtype == dtype
    tolerance = TOLERANCE[dtype]
    assert_close(values, by_groups(rows, kernel, ends), tolerance)
    assert_close(by_rows, by_groups(upstream, kernel.swapaxes(1, 2), ends), tolerance)
    starts = [0, *ends[:-1]]
    parts = [rows[s:e].T @ upstream[s:e] for s, e in zip(starts, ends, strict=True)]
    assert_close(by_kernel, np.stack(parts), tolerance)


def test_no_rows():
    def product(rows, kernel):
        return jax_gpu.grouped_matmul(rows, kernel, jnp.zeros(2, "int32"))

    rows, kernel = jnp.zeros((0, 3)), jnp.ones((2, 3, 5))
    values, pullback = jax.vjp(product, rows, kernel)
    assert values.shape == (0, 5)
    by_rows, by_kernel = pullback(values)
    assert by_rows.shape == (0, 3)
    assert_close(by_kernel, np.zeros((2, 3, 5)), 0.0)


def test_gradients_of_gradients():
    rows, kernel, upstream, ends, tiling = sample(LOADS["spare rows"], 8, 16, "float32")

    def penalty(product):
        def of(rows, kernel):
            def energy(rows, kernel):
                return jnp.sum(jnp.sin(product(rows, kernel)) * upstream)

            return sum(jnp.sum(g**2) for g in jax.grad(energy, (0, 1))(rows, kernel))

        return jax.grad(of, (0, 1))(jnp.asarray(rows, "float32"), jnp.asarray(kernel, "float32"))

    def plain(rows, kernel):
        group = np.searchsorted(ends, np.arange(len(rows)), side="right")
        taken = jnp.where((group < len(ends))[:, None, None], kernel[group % len(ends)], 0)
        return jnp.einsum("ri,rio->ro", rows, taken)

    found = penalty(lambda r, k: jax_gpu.grouped_matmul(r, k, jnp.asarray(ends), tiling))
    for mine, theirs in zip(found, penalty(plain), strict=True):
        assert_close(mine, np.asarray(theirs, "float64"), 1e-5)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """As on an NVIDIA GPU, with kernels that are interpreted."""
    tiling = jax_gpu.tiling

    def interpreted(total, num_experts, itemsize):
        return tiling(total, num_experts, itemsize, interpret=True)

    monkeypatch.setattr(jax_gpu, "tiling", interpreted)
    monkeypatch.setattr(backend.current, "_has_tensor_cores", lambda: True)
    caches = (native._problem, choose._costs)  # what is decided once and kept
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


def test_a_layer_takes_it_and_its_values_are_those_of_a_walk(on_a_gpu):
    x = np.random.default_rng(1).normal(size=(2, 40, 8)).astype("float32")
    layer, walk = [MoE(4, 8, top_k=2, dispatch=way) for way in ("grouped", "walk")]
    for each in (layer, walk):
        each.build(x.shape)
    walk.set_weights(layer.get_weights())
    assert_close(layer(x), np.asarray(walk(x), "float64"), 1e-6)

    def gradients(layer):
        weights = [v.value for v in layer.trainable_variables]
        others = [v.value for v in layer.non_trainable_variables]

        def loss(weights, x):
            outputs = layer.stateless_call(weights, others, x, training=True)[0]
            return jnp.mean(outputs.astype("float32") ** 2)

        return jax.jit(jax.grad(loss, (0, 1)))(weights, x)

    mine, theirs = jax.tree.leaves(gradients(layer)), jax.tree.leaves(gradients(walk))
    for found, expected in zip(mine, theirs, strict=True):
        expected = np.asarray(expected, "float64")
        assert_close(found / np.abs(expected).max(), expected / np.abs(expected).max(), 1e-5)


def test_auto_takes_it_also_where_a_program_is_traced(on_a_gpu):
    """The check runs while `jit` traces, which kernels of Pallas must not notice."""
    layer = MoE(8, 16, top_k=2)
    layer.build((None, 16))
    planned = []

    @jax.jit
    def traced(x):
        planned.append(layer.dispatch_plan(4096).dispatcher)
        return x

    traced(jnp.ones(3))
    assert planned == ["grouped"]


@pytest.mark.parametrize("dispatch", ["auto", "grouped"])
def test_an_export_for_any_batch_holds_no_kernel_of_a_gpu(on_a_gpu, dispatch):
    """It is for any device, and a kernel's blocks are of static numbers."""
    layer = MoE(8, 16, top_k=2, dispatch=dispatch)
    layer.build((None, 16))
    weights = [v.value for v in layer.trainable_variables]
    others = [v.value for v in layer.non_trainable_variables]
    (batch,) = jax.export.symbolic_shape("batch")
    exported = jax.export.export(
        jax.jit(lambda x: layer.stateless_call(weights, others, x, training=False)[0])
    )(jax.ShapeDtypeStruct((batch, 16), "float32"))
    x = np.random.default_rng(0).normal(size=(5, 16)).astype("float32")
    assert_close(exported.call(x), np.asarray(layer(x), "float64"), 1e-5)


@pytest.mark.skipif(os.environ.get("JAX_PLATFORMS", "cpu") != "cpu", reason="its own device's then")
def test_a_cpu_takes_a_walk():
    assert not backend.current._has_tensor_cores()
    assert not native.is_good("float32")


@pytest.mark.parametrize(
    ("sizes", "dtype"),
    [
        ((4096, 256, 384, 8), "bfloat16"),
        ((64, 256, 384, 8), "bfloat16"),
        ((359, 40, 24, 8), "float16"),
        ((359, 40, 24, 8), "float32"),
        ((7, 3, 5, 2), "float32"),
    ],
)
def test_triton_takes_the_programs(sizes, dtype):
    total, width, hidden, experts = sizes

    def energy(rows, kernel, ends):
        return jnp.sum(jax_gpu.grouped_matmul(rows, kernel, ends).astype("float32") ** 2)

    lowered = jax.export.export(
        jax.jit(jax.grad(energy, (0, 1))),
        platforms=["cuda"],
        disabled_checks=[jax.export.DisabledSafetyCheck.custom_call(TRITON)],
    )(
        jax.ShapeDtypeStruct((total, width), dtype),
        jax.ShapeDtypeStruct((experts, width, hidden), dtype),
        jax.ShapeDtypeStruct((experts,), "int32"),
    )
    # The product, its gradient by the rows, and that by the kernels.
    assert triton_programs(lowered.mlir_module()) == 3


def triton_programs(module):
    """Counts the Triton programs in a module, after Triton's parser has checked each.

    Lowering does not check them: bounds of a loop in two types went through it, and failed on the
    first GPU.
    """
    context = mlir.make_ir_context()
    triton.dialect.register_dialect(context)
    count = 0

    def visit(operation):
        nonlocal count
        attributes = operation.attributes
        is_call = operation.name == "stablehlo.custom_call"
        if is_call and TRITON in str(attributes["call_target_name"]):
            code = ir.DictAttr(attributes["mhlo.backend_config"])["ir"]
            assert ir.Module.parse(ir.StringAttr(code).value_bytes).operation.verify()
            count += 1
        return ir.WalkResult.ADVANCE

    with context:
        ir.Module.parse(module).operation.walk(visit)
    return count


@pytest.mark.parametrize("capability", ["7.5", "gfx942"])
def test_a_card_without_kernels_is_named_once_and_takes_a_walk(capability, monkeypatch):
    card = types.SimpleNamespace(compute_capability=capability, device_kind="Old Card")
    has_tensor_cores = backend.current._has_tensor_cores
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax, "devices", lambda: [card])
    has_tensor_cores.cache_clear()
    try:
        with pytest.warns(
            UserWarning, match=f"not for Old Card, {capability}: experts run one"
        ) as said:
            assert not backend.current.may_have_grouped_matmul(True)
            assert not backend.current.may_have_grouped_matmul(True)
        assert len(said) == 1
    finally:
        has_tensor_cores.cache_clear()
