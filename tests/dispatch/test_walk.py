"""The walk over experts' rows against float64, expert by expert, on every backend."""

import math

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe.dispatch import backend, native
from keras_moe.dispatch.grouped import run_stages
from keras_moe.dispatch.layout import Rows, Slots, Stage

NAME = keras.backend.backend()
WIDTHS = (6, 5, 4)  # of no multiple of anything
# Rows per expert. JAX has blocks of 8 to 512 rows; each size, and each rest, must be met.
LOADS = {
    "few": [2, 0, 1, 0, 3],
    "one": [1],
    "empty": [0, 0, 0],
    "one_takes_all": [0, 300, 0],
    "ragged": [37, 0, 91, 1, 64, 60, 3],
    "blocks_of_every_size": [512 + 128 + 32 + 7, 511, 513, 0, 129, 31, 895],
    "large_blocks": [2048 + 128 + 1, 1023],
}


def silu(x):
    return x / (1 + np.exp(-x))


def silu_slope(x):
    s = 1 / (1 + np.exp(-x))
    return s * (1 + x * (1 - s))


def walk(rows, ends, stages, total, weights=None):
    """The backend's walk, gathering between identities, with weights `(total, 1)` or with ones."""
    module = backend.current
    everything = np.arange(rows.shape[0], dtype="int32")
    assignment = np.where(everything < total, everything, total)
    slots = Slots(*map(ops.convert_to_tensor, (assignment, everything[:total])))
    weights = ops.ones((total, 1), dtype="float32") if weights is None else weights
    outputs = module.walk(rows[:total], Rows(weights, slots, ends), stages)
    return ops.pad(outputs, ((0, rows.shape[0] - total), (0, 0)))


class Problem:
    """Random rows and two layers, gated or not, with the answer in float64."""

    def __init__(self, loads, gated, biased, scaled, spare=3):
        rng = np.random.default_rng(sum(loads))
        self.loads, self.gated, self.biased, self.scaled = loads, gated, biased, scaled
        self.ends = np.cumsum(loads)
        self.total = int(self.ends[-1]) + spare  # the last ones belong to nobody: padding
        self.padding = backend.current.row_padding(self.total, len(loads))
        count, (d, h, out) = self.total + self.padding, WIDTHS
        experts, kernels = len(loads), 1 + gated
        self.tensors = [
            rng.normal(size=(count, d)),
            *(rng.normal(size=(experts, d, h)) / math.sqrt(d) for _ in range(kernels)),
            *(rng.normal(size=(experts, h)) for _ in range(kernels * biased)),
            *([rng.uniform(0.5, 2.0, size=(count, h))] * scaled),
            rng.normal(size=(experts, h, out)) / math.sqrt(h),
            *(rng.normal(size=(experts, out)) for _ in range(biased)),
        ]
        self.direction = rng.normal(size=(count, out))

    def split(self, tensors):
        left = iter(tensors)

        def take(count):
            return tuple(next(left) for _ in range(count))

        rows, kernels = take(1)[0], take(1 + self.gated)
        biases, scale = take((1 + self.gated) * self.biased), take(int(self.scaled))
        return rows, kernels, biases, scale[0] if scale else None, take(1), take(int(self.biased))

    def stages(self, tensors):
        rows, kernels, biases, scale, last, last_bias = self.split(tensors)
        activation = (lambda g, v: ops.silu(g) * v) if self.gated else ops.silu
        return rows, [Stage(kernels, biases, activation, scale), Stage(last, last_bias, None)]

    def expected(self):
        """The outputs, and the gradients of their product with `direction`, by hand."""
        rows, kernels, biases, scale, (last,), last_bias = self.split(self.tensors)
        gradients = [np.zeros_like(tensor) for tensor in self.tensors]
        by_rows, by_kernels, by_biases, by_scale, (by_last,), by_last_bias = self.split(gradients)
        outputs = np.zeros((len(rows), WIDTHS[-1]))
        for expert, (start, end) in enumerate(zip([0, *self.ends[:-1]], self.ends, strict=True)):
            own = slice(start, end)
            x, up = rows[own], self.direction[own]
            sums = [x @ k[expert] for k in kernels]
            sums = [s + b[expert] for s, b in zip(sums, biases, strict=True)] if biases else sums
            active = silu(sums[0]) * (sums[1] if self.gated else 1)
            factor = 1.0 if scale is None else scale[own]
            outputs[own] = (active * factor) @ last[expert]
            by_active = up @ last[expert].T
            by_last[expert] = (active * factor).T @ up
            if last_bias:
                outputs[own] += last_bias[0][expert]
                by_last_bias[0][expert] = up.sum(0)
            if scale is not None:
                by_scale[own] = by_active * active
            by_active = by_active * factor
            by_sums = [by_active * silu_slope(sums[0]) * (sums[1] if self.gated else 1)]
            if self.gated:
                by_sums.append(by_active * silu(sums[0]))
            for which, by_sum in enumerate(by_sums):
                by_kernels[which][expert] = x.T @ by_sum
                by_rows[own] += by_sum @ kernels[which][expert].T
                if biases:
                    by_biases[which][expert] = by_sum.sum(0)
        return outputs, gradients

    def found(self, run, compiled=lambda function: function):
        """The same of `run(rows, ends, stages, total)`, in float32."""
        ends = ops.convert_to_tensor(self.ends.astype("int32"))
        live = np.arange(self.total + self.padding)[:, None] < self.ends[-1]
        direction = ops.convert_to_tensor(self.direction.astype("float32"))

        def outputs_of(tensors):
            rows, stages = self.stages(tensors)
            return ops.where(live, run(rows, ends, stages, self.total), 0)

        def objective(tensors):
            return ops.sum(outputs_of(tensors) * direction)

        tensors = [ops.convert_to_tensor(tensor.astype("float32")) for tensor in self.tensors]
        outputs = ops.convert_to_numpy(compiled(outputs_of)(tensors))
        gradients = compiled(lambda tensors: gradients_of(objective, tensors))(tensors)
        return outputs, [ops.convert_to_numpy(g) for g in gradients]

    def check(self, run, compiled=lambda function: function):
        outputs, gradients = self.expected()
        found, found_gradients = self.found(run, compiled)
        assert_close(found, outputs)
        owned = self.ends[-1]
        for got, wanted in zip(found_gradients, gradients, strict=True):
            if len(wanted) == self.total + self.padding:  # by row; what nobody owns is undefined
                got, wanted = got[:owned], wanted[:owned]
            assert_close(got, wanted)


def gradients_of(objective, tensors):
    if NAME == "jax":
        import jax

        return jax.jit(jax.grad(objective))(tensors)
    if NAME == "torch":
        import torch

        leaves = [tensor.detach().requires_grad_() for tensor in tensors]
        return [g.detach() for g in torch.autograd.grad(objective(leaves), leaves)]
    import tensorflow as tf

    with tf.GradientTape() as tape:
        tape.watch(tensors)
        value = objective(tensors)
    return tape.gradient(value, tensors)


def assert_close(got, wanted):
    assert got.shape == wanted.shape
    if wanted.size:
        error = np.abs(got - wanted).max() / max(np.abs(wanted).max(), 1e-12)
        assert error < 1e-5, error


STAGES = {
    "biased": (False, True, False),
    "gated-biased-scaled": (True, True, True),
    "gated": (True, False, False),
}
# The rows of an expert are cut into blocks whatever is done with them: where XLA compiles, one kind
# of stages meets all loads, and the others those that make the most blocks.
PROBLEMS = [
    pytest.param(
        load,
        *stages,
        id=f"{kind}-{name}",
        marks=[]
        if kind == "biased" or name in ("ragged", "blocks_of_every_size")
        else [pytest.mark.one_backend("each load and each kind of stages is compiled with others")],
    )
    for kind, stages in STAGES.items()
    for name, load in LOADS.items()
]
problems = pytest.mark.parametrize(("loads", "gated", "biased", "scaled"), PROBLEMS)


@problems
def test_values_and_gradients(loads, gated, biased, scaled):
    Problem(loads, gated, biased, scaled).check(walk)


@pytest.fixture
def under_xla(monkeypatch):
    """TensorFlow's compiler of XLA, for which the walk is another one and wants spare rows."""
    import tensorflow as tf

    monkeypatch.setattr(backend.current, "_is_under_xla", lambda: True)
    return lambda function: tf.function(function, jit_compile=True)


@pytest.mark.skipif(NAME != "tensorflow", reason="JAX has no other walk, PyTorch no XLA")
@problems
def test_values_and_gradients_under_xla(loads, gated, biased, scaled, under_xla):
    Problem(loads, gated, biased, scaled).check(walk, under_xla)


def check_weights(loads, gated, compiled=lambda function: function):
    problem = Problem(loads, gated, True, False)
    weights = np.random.default_rng(1).uniform(0.5, 2.0, size=(problem.total, 1))
    outputs, _ = problem.expected()
    by_weight = np.sum(outputs * problem.direction, axis=-1)[: problem.total, None]
    direction, spare = problem.direction, np.ones((problem.padding, 1))
    problem.direction = direction * np.concatenate([weights, spare])  # all is linear in both
    _, wanted = problem.expected()
    live = np.arange(problem.total + problem.padding)[:, None] < problem.ends[-1]
    ends = ops.convert_to_tensor(problem.ends.astype("int32"))

    def objective(tensors):
        rows, stages = problem.stages(tensors[1:])
        given = ops.where(live, walk(rows, ends, stages, problem.total, tensors[0]), 0)
        return ops.sum(given * ops.convert_to_tensor(direction.astype("float32")))

    tensors = [ops.convert_to_tensor(a.astype("float32")) for a in (weights, *problem.tensors)]
    found = compiled(lambda tensors: gradients_of(objective, tensors))(tensors)
    owned = problem.ends[-1]
    for got, right in zip(found, [by_weight, *wanted], strict=True):
        is_by_row = len(right) in (problem.total, problem.total + problem.padding)
        got = ops.convert_to_numpy(got)
        assert_close(*((got[:owned], right[:owned]) if is_by_row else (got, right)))


@pytest.mark.parametrize("loads", ["ragged", "blocks_of_every_size"])
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_of_weights(loads, gated):
    check_weights(LOADS[loads], gated)


@pytest.mark.skipif(NAME != "tensorflow", reason="JAX has no other walk, PyTorch no XLA")
@pytest.mark.parametrize("loads", ["ragged", "blocks_of_every_size"])
@pytest.mark.parametrize("gated", [False, True])
def test_gradients_of_weights_under_xla(loads, gated, under_xla):
    check_weights(LOADS[loads], gated, under_xla)


@pytest.mark.skipif(NAME != "tensorflow", reason="JAX has no other walk, PyTorch no XLA")
def test_what_is_not_finite_stays_with_its_expert_under_xla(under_xla):
    check_finite_elsewhere(under_xla)


@pytest.mark.skipif(NAME == "tensorflow", reason="TensorFlow has no grouped matmul")
@pytest.mark.parametrize("loads", ["few", "ragged", "one_takes_all"])
def test_the_native_way(loads):
    Problem(LOADS[loads], True, True, True).check(lambda *arguments: run_stages(*arguments[:3]))


def test_what_is_not_finite_stays_with_its_expert():
    check_finite_elsewhere()


def check_finite_elsewhere(compiled=lambda function: function):
    problem = Problem([5, 40, 3], False, True, False)
    problem.tensors[0][6] = np.nan  # a row of the second expert
    _, gradients = problem.found(walk, compiled)
    for by_expert in gradients[1:]:
        assert np.isfinite(by_expert[[0, 2]]).all()
    assert not np.isfinite(gradients[1][1]).all()
    by_row = gradients[0][: problem.ends[-1]]
    assert np.isfinite(np.delete(by_row, 6, axis=0)).all()


def test_nobodys_slots_give_no_slope():
    """The token that fills them may have any gradient; an assignment without expert has none."""
    apply, padding = backend.current.walk, backend.current.row_padding(3, 1)
    assignment = np.array([0, 1, 3] + [3] * padding, "int32")
    slot_of = np.array([0, 1, 3 + padding], "int32")
    slots = Slots(*map(ops.convert_to_tensor, (assignment, slot_of)))
    ends = ops.convert_to_tensor(np.array([2], "int32"))
    direction = np.ones((3, 4), "float32")
    direction[0] = np.inf
    direction = ops.convert_to_tensor(direction)

    def objective(tensors):
        tokens, weights, kernel = tensors
        outputs = apply(tokens, Rows(weights, slots, ends), [Stage((kernel,), (), None)])
        return ops.sum(outputs * direction)

    tensors = [ops.ones(shape, dtype="float32") for shape in ((3, 4), (3, 1), (1, 4, 4))]
    tokens, weights, _ = map(ops.convert_to_numpy, gradients_of(objective, tensors))
    assert not np.isfinite(weights[0])
    np.testing.assert_array_equal(weights[1:], [[16], [0]])
    np.testing.assert_array_equal(tokens[1:], [[4] * 4, [0] * 4])


def test_half_precision_adds_up_in_float32():
    """4,096 rows whose slopes are 1: a sum of ones in bfloat16 is 256."""
    rows, ends = np.ones((4096, 8), "float32"), np.array([4096], "int32")
    padding = backend.current.row_padding(4096, 1)
    rows = np.concatenate([rows, np.zeros((padding, 8), "float32")])
    tensors = [ops.cast(ops.convert_to_tensor(a), "bfloat16") for a in (rows, np.ones((1, 8, 8)))]

    def objective(tensors):
        stages = [Stage((tensors[1],), (), None)]
        outputs = walk(tensors[0], ops.convert_to_tensor(ends), stages, 4096)
        return ops.sum(ops.cast(outputs[:4096], "float32"))

    slopes = gradients_of(objective, tensors)[1]
    np.testing.assert_array_equal(ops.convert_to_numpy(ops.cast(slopes, "float32")), 4096)


class TestNative:
    def test_is_checked_before_it_is_used(self, monkeypatch):
        if NAME == "tensorflow":
            with pytest.raises(ValueError, match="tensorflow has no grouped matmul"):
                native.check("float32")
            return
        native.check("float32")
        native._problem.cache_clear()
        right = backend.current.grouped_matmul
        monkeypatch.setattr(backend.current, "grouped_matmul", lambda *a: right(*a) * (1 + 5e-4))
        with pytest.raises(ValueError, match=r"cannot be used here: its largest relative error"):
            native.check("float32")
        native._problem.cache_clear()

    def test_one_that_fails_is_told(self, monkeypatch):
        if NAME == "tensorflow":
            return

        def broken(*arguments):
            raise RuntimeError("no kernel image")

        native._problem.cache_clear()
        monkeypatch.setattr(backend.current, "grouped_matmul", broken)
        with pytest.raises(ValueError, match=r"fails with RuntimeError: no kernel image.*'walk'"):
            native.check("float32")
        native._problem.cache_clear()

    def test_is_not_taken_unasked_on_a_cpu(self):
        assert not native.is_good("float32")
