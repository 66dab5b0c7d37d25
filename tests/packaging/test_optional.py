"""Where an extra is missing, the message names it; where a part of it is, that part."""

import os
import subprocess
import sys

import pytest

from keras_moe import callbacks, plots, tuning
from keras_moe.core import optional
from keras_moe.core.optional import import_of_extra


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Makes packages of one line that can be imported in this test."""
    monkeypatch.syspath_prepend(tmp_path)

    def make(name, line):
        monkeypatch.delitem(sys.modules, name, raising=False)
        (tmp_path / f"{name}.py").write_text(line)

    return make


def test_what_is_there_comes_back(package):
    package("whole_thing", "answer = 42")
    assert import_of_extra("plot", "This", "whole_thing").answer == 42
    assert import_of_extra("plot", "This", "os.path") is os.path


def test_what_is_not_installed_is_to_be_installed():
    message = (
        r'^This needs `no_such_thing`: install keras_moe with its extra "plot", '
        r'in a clone `pip install "\.\[plot\]"`$'
    )
    with pytest.raises(ImportError, match=message) as error:
        import_of_extra("plot", "This", "no_such_thing.inner")
    assert error.value.name == "no_such_thing"


def test_what_an_installed_package_misses_is_named(package):
    package("half_there", "import no_such_thing.inner")
    message = (
        r"^This needs `half_there`, which is installed; `no_such_thing`, which it imports, is not$"
    )
    with pytest.raises(ImportError, match=message) as error:
        import_of_extra("plot", "This", "half_there")
    assert error.value.name == "no_such_thing"


def test_what_an_installed_package_fails_with_is_said(package):
    package("too_old", "from os import no_such_function")
    message = (
        r"^This needs `too_old`, which is installed but cannot be imported: cannot import name"
    )
    with pytest.raises(ImportError, match=message):
        import_of_extra("plot", "This", "too_old")


USERS = {
    "matplotlib": lambda path: plots.load_over_time(path / "history.jsonl"),
    "keras_tuner": lambda path: tuning.ActiveCost("loss", "min").objective,
    "tensorboard": lambda path: callbacks.ExpertMonitor(log_dir=path),
}


@pytest.mark.parametrize("name", USERS)
def test_each_user_of_an_extra_names_what_misses(name, tmp_path, monkeypatch):
    def import_module(module):
        assert module.partition(".")[0] == name
        raise ModuleNotFoundError("No module named 'six'", name="six")

    (tmp_path / "history.jsonl").write_text('{"counts": {"moe": {"load": [1, 2]}}}')
    monkeypatch.setattr(optional, "import_module", import_module)
    with pytest.raises(ImportError, match=f"needs `{name}`, which is installed; `six`, which it"):
        USERS[name](tmp_path)


def test_so_does_the_bridge(tmp_path):
    """In a process of its own, where Keras 2 is the one that `tf.keras` is."""
    (tmp_path / "tf_keras.py").write_text("import no_such_thing")
    process = subprocess.run(
        [sys.executable, "-c", "import keras_moe.integrations.tfrs"],
        env={
            **os.environ,
            "TF_USE_LEGACY_KERAS": "1",
            "KERAS_BACKEND": "tensorflow",
            "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]),
        },
        capture_output=True,
        text=True,
    )
    said = "needs `tf_keras`, which is installed; `no_such_thing`, which it imports, is not"
    assert process.returncode == 1 and said in process.stderr, process.stderr[-2000:]
