"""What makes searches of tiny models quick."""

import gc

import keras
import pytest


@pytest.fixture(scope="module")
def quick_search():
    """Cheap garbage collection and compilation, which are most of a tiny trial's time."""
    gc.collect()
    gc.freeze()  # KerasTuner collects twice per trial, through all that the backend has imported
    if keras.backend.backend() != "jax":
        yield
    else:
        import jax

        jax.config.update("jax_disable_most_optimizations", True)
        yield
        jax.config.update("jax_disable_most_optimizations", False)
        jax.clear_caches()  # what was compiled so rounds otherwise and would stay
    gc.unfreeze()
