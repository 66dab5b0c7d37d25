"""Time to compile: a first call of a new function, less a second one."""

from __future__ import annotations

import time
from collections.abc import Callable

from benchmarks.engines import Engine, Step


def compile_seconds(
    engine: Engine, make_step: Callable[[], Step], clock: Callable[[], float] = time.perf_counter
) -> float:
    """Seconds to trace and compile what `make_step` makes."""
    engine.forget()
    step = make_step()
    start = clock()
    step()
    middle = clock()
    step()
    end = clock()
    return max((middle - start) - (end - middle), 1e-9)
