"""What a user installs: the wheel, away from the source tree, with Keras and one backend."""

import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from hatch_build import for_index

ROOT = Path(__file__).parents[2]

USE_THE_WHEEL = """
import sys
before = set(sys.modules)
import keras
with_keras = set(sys.modules)
import keras_moe
ours = set(sys.modules) - with_keras
assert keras_moe.__file__.startswith(sys.argv[1]), keras_moe.__file__
vendors = ("tensorflow", "jax", "torch", "tf_keras", "keras_tuner", "matplotlib", "rich")
assert not [m for m in ours if m.split(".")[0] in vendors], ours
import numpy as np
layer = keras_moe.layers.MoE(4, 8)
assert tuple(layer(np.zeros((2, 3, 6), "float32")).shape) == (2, 3, 6)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check"]
        + ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)],
        check=True,
    )
    (path,) = folder.glob("*.whl")
    with zipfile.ZipFile(path) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


@pytest.mark.parametrize("backend", ["jax", "tensorflow", "torch"])
def test_wheel_works_away_from_the_tree(wheel, backend, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(wheel), "KERAS_BACKEND": backend}
    process = subprocess.run(
        [sys.executable, "-c", USE_THE_WHEEL, str(wheel)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-3000:]


def test_wheel_holds_the_package_only(wheel):
    tops = {path.name for path in wheel.iterdir()}
    assert {name.split("-")[0] for name in tops} == {"keras_moe"}
    assert (wheel / "keras_moe" / "py.typed").exists()


def test_index_shows_no_path_of_the_repository(wheel):
    (metadata,) = wheel.glob("*.dist-info/METADATA")
    page = metadata.read_text(encoding="utf-8")
    assert "Content-Type: text/markdown" in page and "# keras_moe" in page
    targets = re.findall(r"\]\(([^)]+)\)", page)
    assert not [target for target in targets if not target.startswith(("https://", "#"))]


def test_index_shows_pictures_and_links_once_there_is_an_address():
    readme = (
        "See [how](docs/how.md) and [Keras](https://keras.io).\n\n![Slots](docs/img/slots.png)\n"
    )
    assert for_index(readme, "https://example.org/us/keras_moe") == (
        "See [how](https://example.org/us/keras_moe/blob/HEAD/docs/how.md) and "
        "[Keras](https://keras.io).\n\n"
        "![Slots](https://example.org/us/keras_moe/raw/HEAD/docs/img/slots.png)\n"
    )
    assert for_index(readme, None) == "See how and [Keras](https://keras.io).\n\n\n"


def test_import_is_quick():
    """A tenth of what Keras takes, in processor time, which a busy machine does not change."""
    script = (
        "from time import process_time as now; start = now(); import keras; middle = now();"
        "import keras_moe; print((now() - middle) / (middle - start))"
    )
    process = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(process.stdout) < 0.1
