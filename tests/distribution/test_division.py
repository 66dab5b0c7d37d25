"""A call divided among devices gives what one device gives, and the work is divided."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent / "divide.py"
DEVICES, EXPERTS, WIDTH, HIDDEN, SLOTS = 8, 8, 12, 16, 24


@pytest.fixture(scope="module")
def runs():
    process = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)


def assert_alike(found, expected):
    assert found["loss"] == pytest.approx(expected["loss"], rel=1e-5)
    assert set(found["arrays"]) == set(expected["arrays"])
    for name, array in expected["arrays"].items():
        scale = max(np.abs(array).max(), 1e-6)
        np.testing.assert_allclose(
            found["arrays"][name], array, rtol=1e-4, atol=2e-5 * scale, err_msg=name
        )
    for name, count in expected["counts"].items():
        np.testing.assert_allclose(found["counts"][name], count, rtol=1e-4, err_msg=name)


NAMES = [
    "default",
    "gated, shared",
    "sigmoid_bias",
    "relu",
    "all losses",
    "sinkhorn",
    "weighed inputs",
    "by example",
    "Keras layers",
    "ample capacity",
    "ample capacity, glu",
    "capacity by example",
    "few tokens by lookup",
    "dense",
    "grouped",
    "padded blocks",
    "rematerialized",
    "soft",
]


@pytest.mark.parametrize("name", NAMES)
def test_outputs_gradients_losses_and_counts_are_those_of_one_device(runs, name):
    found = runs[name]
    assert "batch" in found
    for place in {"batch", "both", "experts"} & set(found):
        assert_alike(found[place], found["alone"])


def test_no_case_is_left_out(runs):
    assert set(runs) == {*NAMES, "capacity", "switch", "batch_priority", "expert_choice"}


@pytest.mark.parametrize("name", ["switch", "batch_priority", "expert_choice"])
@pytest.mark.parametrize("place, parts", [("batch", "quarters"), ("both", "halves")])
def test_a_capacity_is_that_of_a_part_of_the_batch(runs, name, place, parts):
    found, alone = runs[name][place], runs[name][parts]
    outputs = np.concatenate([part["arrays"]["outputs"] for part in alone])
    np.testing.assert_allclose(found["arrays"]["outputs"], outputs, rtol=1e-4, atol=1e-6)
    for count in ("assignments", "dropped", "load"):
        expected = np.sum([part["counts"][count] for part in alone], axis=0)
        np.testing.assert_allclose(found["counts"][count], expected, rtol=1e-5, err_msg=count)
    if name != "expert_choice":
        assert found["counts"]["dropped"] > 0


def test_batches_are_divided_without_gathering_assignments(runs):
    """XLA alone gathered all assignments, and summed every block's tokens over the devices."""
    for name in ("default", "gated, shared", "capacity", "grouped"):
        for operation, shape in runs[name]["batch"]["collectives"]:
            assert operation == "all-reduce", (name, operation, shape)
            assert not shape.startswith(("s32[96", "f32[96,", "f32[48,12", "pred[")), (name, shape)


@pytest.mark.parametrize("name", ["default", "capacity"])
def test_experts_are_divided_without_moving_their_weights(runs, name):
    """XLA alone gathered every expert's weights on every device."""
    for operation, shape in runs[name]["experts"]["collectives"]:
        assert operation == "all-reduce", (operation, shape)
        assert not shape.startswith(f"f32[{EXPERTS},"), shape


def test_memory_and_work_of_experts_are_divided(runs):
    alone, divided = runs["capacity"]["alone"], runs["capacity"]["experts"]
    weights = EXPERTS * (WIDTH * HIDDEN + HIDDEN + HIDDEN * WIDTH + WIDTH)
    left = 1 / DEVICES
    assert alone["bytes"] - divided["bytes"] == pytest.approx(4 * weights * (1 - left), rel=0.01)
    # Two matmuls, forward, and by inputs and weights; what else there is, routing, is not divided.
    products = 3 * 2 * 2 * EXPERTS * SLOTS * WIDTH * HIDDEN
    assert alone["flops"] - divided["flops"] >= products * (1 - left)
    assert divided["flops"] < alone["flops"] - products * (1 - left) + 0.2 * products
    assert runs["capacity"]["batch"]["flops"] < 0.35 * alone["flops"]
