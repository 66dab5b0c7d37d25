"""Replicas of TensorFlow and PyTorch: what follows the load follows that of all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

FOLDER = Path(__file__).parent


@pytest.fixture(scope="module", params=["train_mirrored", "train_ddp"])
def run(request):
    process = subprocess.run(
        [sys.executable, FOLDER / f"{request.param}.py"],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout)


def test_replicas_are_one_model(run):
    """The bias, the penalty and the balance loss followed each replica's own part before."""
    alone = run["alone"]["weights"]
    for replica in run["replicas"]:
        assert set(replica["weights"]) == set(alone)
        for path, expected in alone.items():
            found = replica["weights"][path]
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-5, err_msg=path)


def test_what_follows_the_load_has_changed(run):
    weights = run["alone"]["weights"]
    assert np.abs(weights["bias/router/bias"]).max() > 0.005
    assert weights["relu/router/penalty"] != pytest.approx(1e-8, rel=1e-2)


def test_counts_are_of_all_replicas(run):
    alone = run["alone"]["counts"]
    assert sum(alone["top_k"]["load"]) == 2 * 32 * 12 and alone["mmoe"]["decisions"] == 32 * 12
    for replica in run["replicas"]:
        for layer, counts in alone.items():
            for name, expected in counts.items():
                found = replica["counts"][layer][name]
                np.testing.assert_allclose(
                    found, expected, rtol=1e-4, atol=2e-3, err_msg=f"{layer} {name}"
                )
