"""Every test starts from the same random state, in float32, with no default policy left behind."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import pytest

# What these assert is shown with its values, as what test modules assert.
pytest.register_assert_rewrite("tests.contract", "tests.helpers", "tests.oracle")


# Eager: it has no program to compile, and is done first.
ONE_BACKEND = "torch"


def pytest_addoption(parser):
    parser.addoption(
        "--everything",
        action="store_true",
        help=f"run on every backend what {ONE_BACKEND} alone runs otherwise",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers",
        "one_backend(reason): what no backend can break alone; a module's tests, or one of them.",
    )
    config.addinivalue_line("markers", "every_backend: of such a module, what runs on all of them.")


def pytest_collection_modifyitems(config, items):
    """Leaves out what another backend's run has."""
    if config.getoption("--everything") or keras.backend.backend() == ONE_BACKEND:
        return
    mine, others = [], []
    for item in items:
        is_of_one = item.get_closest_marker("one_backend") is not None
        is_here = not is_of_one or item.get_closest_marker("every_backend") is not None
        (mine if is_here else others).append(item)
    items[:] = mine
    config.hook.pytest_deselected(items=others)


@pytest.fixture(autouse=True)
def _fresh_session():
    keras.utils.clear_session(free_memory=False)
    keras.utils.set_random_seed(1234)
    yield
    keras.config.set_dtype_policy("float32")
