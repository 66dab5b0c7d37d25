"""Functions that take turns."""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable, Mapping

from benchmarks.engines import Step

SHORTEST_SAMPLE = 0.01  # seconds: far above the clock's and the scheduler's grain
FEWEST_ROUNDS = 3


def warm_up(step: Step, clock: Callable[[], float] = time.perf_counter) -> float:
    """Calls a function until it is compiled, and returns how long a call then takes."""
    step()
    step()
    start = clock()
    step()
    return max(clock() - start, 1e-9)


def rounds_within(seconds: float, repeats: int, once: float) -> int:
    """How many rounds a function of duration `once` takes part in, to keep to its time."""
    return min(repeats, max(FEWEST_ROUNDS, int(seconds / max(once, SHORTEST_SAMPLE))))


def alternate(
    steps: Mapping[str, Step],
    durations: Mapping[str, float],
    repeats: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float | None]]:
    """Times functions in turns, a, b, c, a, b, c, ..., and returns seconds per call by round.

    Args:
        steps: by name, warm.
        durations: about how long each takes; a short one is called several times per sample.
        repeats: rounds.
        seconds: about the most that one function may take in all. A slow one sits out the later
            rounds, as None.
        clock: reads the time.
    """
    calls = {name: math.ceil(SHORTEST_SAMPLE / durations[name]) for name in steps}
    rounds = {name: rounds_within(seconds, repeats, durations[name]) for name in steps}
    samples: dict[str, list[float | None]] = {name: [] for name in steps}
    for turn in range(repeats):
        gc.collect()  # here, and not in a sample
        for name, step in steps.items():
            taking_part = turn < rounds[name]
            samples[name].append(_sample(step, calls[name], clock) if taking_part else None)
    return samples


def _sample(step: Step, calls: int, clock: Callable[[], float]) -> float:
    """Seconds per call, with no garbage collected during the calls."""
    gc.disable()
    try:
        start = clock()
        for _ in range(calls):
            step()
        return (clock() - start) / calls
    finally:
        gc.enable()
