"""A model saved on one backend predicts the same on the other two, in fresh processes."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

HERE = Path(__file__).parent
BACKENDS = ("jax", "tensorflow", "torch")
# What is compiled is run once, and JAX has the programs of one file for those of other backends.
QUICKLY = {
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}


def _run(script: str, backend: str, folder: Path, *arguments: str) -> None:
    environment = {
        **os.environ,
        **QUICKLY,
        "KERAS_BACKEND": backend,
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
    }
    process = subprocess.run(
        [sys.executable, HERE / script, folder, *arguments],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]


@pytest.fixture(scope="module")
def predictions(tmp_path_factory):
    """(saved on, loaded on, model) -> outputs."""
    found = {}
    folder = tmp_path_factory.mktemp("models")
    for backend in BACKENDS:
        _run("save_models.py", backend, folder)
    for backend in BACKENDS:
        _run("load_models.py", backend, folder)
    for path in folder.glob("*.npz"):
        saved_on, loaded_on = path.stem.split("-")
        with np.load(path) as arrays:
            found.update({(saved_on, loaded_on, name): arrays[name] for name in arrays})
    return found


@pytest.mark.parametrize("loaded_on", BACKENDS)
@pytest.mark.parametrize("saved_on", BACKENDS)
def test_predictions_agree(predictions, saved_on, loaded_on, record_property):
    names = {name for _, _, name in predictions}
    assert {"moe", "switch", "soft", "mmoe", "vit", "ranker"} <= names
    for name in sorted(names):
        expected = predictions[saved_on, saved_on, name]
        error = np.abs(predictions[saved_on, loaded_on, name] - expected).max()
        record_property(name, float(error))
        assert error <= 2e-5, name
        assert np.abs(expected).max() > 1e-2, "a constant prediction proves nothing"
