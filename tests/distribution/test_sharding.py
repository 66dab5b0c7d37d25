"""Experts of every layer divided among devices, as docs/devices.md shows it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parent / "train_sharded.py"


@pytest.fixture(scope="module")
def run():
    process = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)


def test_every_expert_is_on_one_device(run):
    """KerasHub's rule matches nothing, and all weights are on all devices without a word."""
    weights = {path for path in run["places"] if "/experts/" in path}
    moments = {path for path in run["places"] if re.search(r"/[a-z]+_experts_", path)}
    moments -= {path for path in moments if "_shared_experts_" in path}
    kinds = {path.split("/")[0] for path in weights}
    assert kinds == {"moe", "gated", "switch", "soft", "mmoe"}
    assert len(moments) == 2 * len(weights)
    experts = weights | moments
    for path, (whole, here) in run["places"].items():
        expected = [whole[0] // 4, *whole[1:]] if path in experts else whole
        assert here == expected, path


def test_training_is_that_of_one_device(run):
    assert len(run["alone"]) == 2 and run["alone"][0] != run["alone"][1]
    np.testing.assert_allclose(run["divided"], run["alone"], rtol=1e-5)
