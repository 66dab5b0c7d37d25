"""Every backend's module has all that the portable one has, and does the same."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from keras import ops

from keras_moe import layers
from keras_moe.dispatch import Rows, Stage, backend
from keras_moe.dispatch.backend import portable
from keras_moe.dispatch.plan import ragged_slots, sort_into_bins
from tests import helpers

FOLDER = Path(backend.__file__).parent


def public(path):
    """The names that a module has, read and not imported: other backends may be missing."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").endswith("backend.portable"):
            names |= {alias.name for alias in node.names}
    return {name for name in names if not name.startswith("_")}


@pytest.mark.parametrize("name", ["jax.py", "torch.py", "tensorflow/__init__.py"])
def test_no_function_is_missing(name):
    assert public(FOLDER / "portable.py") <= public(FOLDER / name)


@pytest.mark.parametrize("choices", [[[0, 1], [2, 0], [1, 3]], [[3, 2], [3, 2], [3, 2]]])
def test_the_portable_walk_is_the_walk(choices):
    rng = np.random.default_rng(0)
    tokens, weights = (rng.normal(size=(3, width)).astype("float32") for width in (5, 2))
    kernels = [rng.normal(size=shape).astype("float32") for shape in ((4, 5, 6), (4, 6, 5))]
    biases = [rng.normal(size=(4, width)).astype("float32") for width in (6, 5)]
    bin_of = np.array(choices, "int32").T.reshape(-1)
    padding = backend.current.row_padding(6, 4)
    bins = sort_into_bins(ops.convert_to_tensor(bin_of), 4)
    slots, ends = ragged_slots(bins, 4, padding)
    tensor = ops.convert_to_tensor
    stages = [
        Stage((tensor(kernel),), (tensor(bias),), activation)
        for kernel, bias, activation in zip(kernels, biases, [ops.tanh, None], strict=True)
    ]
    arguments = tensor(tokens), Rows(tensor(weights), slots, ends), stages
    found = [ops.convert_to_numpy(m.walk(*arguments)) for m in (portable, backend.current)]
    expected = np.zeros((3, 5))
    for token, experts in enumerate(choices):
        for choice, expert in enumerate(experts):
            hidden = np.tanh(
                tokens[token].astype("float64") @ kernels[0][expert] + biases[0][expert]
            )
            expected[token] += weights[token, choice] * (
                hidden @ kernels[1][expert] + biases[1][expert]
            )
    for each in found:
        helpers.assert_close(each, expected, "walk")
    order = bins.order
    np.testing.assert_array_equal(
        ops.convert_to_numpy(portable.inverse_permutation(order)),
        ops.convert_to_numpy(backend.current.inverse_permutation(order)),
    )


ARGUMENTS = {"auto": {}, "capacity": {"capacity_factor": 1.0}, "glu": {"experts": "glu"}}


def outputs_of(arguments):
    """What a layer of known weights gives, as a NumPy array."""
    layer = layers.MoE(3, 5, **arguments)
    layer.build((None, 4))
    rng = np.random.default_rng(0)
    for variable in layer.trainable_variables:
        variable.assign(rng.normal(size=variable.shape).astype("float32"))
    return ops.convert_to_numpy(layer(rng.normal(size=(6, 4)).astype("float32")))


@pytest.mark.one_backend("looks at Keras on NumPy, beside what other tests compare everywhere")
def test_inference_without_any_engine(tmp_path):
    """Keras on NumPy, for serving where nothing else is installed: the same numbers."""
    code = "from tests.dispatch.test_backends import *; np.savez(sys.argv[1], **{"
    code += "name: outputs_of(arguments) for name, arguments in ARGUMENTS.items()})"
    environment = {**os.environ, "KERAS_BACKEND": "numpy"}
    command = [sys.executable, "-c", code, str(tmp_path / "found.npz")]
    subprocess.run(command, env=environment, check=True, cwd=Path(__file__).parents[2])
    found = np.load(tmp_path / "found.npz")
    for name, arguments in ARGUMENTS.items():
        helpers.assert_close(found[name], outputs_of(arguments), name)


@pytest.mark.parametrize("shape", [(7,), (7, 3), (0, 3)])
def test_the_sums_by_segment_are_those_of_keras(shape):
    values = np.random.default_rng(0).normal(size=shape).astype("float32")
    segments = np.array([2, 0, 2, 4, 4, 4, 0][: len(values)], "int32")
    expected = np.zeros((5, *shape[1:]), "float32")
    np.add.at(expected, segments, values)
    tensors = [ops.convert_to_tensor(values), ops.convert_to_tensor(segments)]
    found = ops.convert_to_numpy(backend.current.segment_sum(*tensors, 5))
    np.testing.assert_allclose(found, expected, rtol=1e-6)
