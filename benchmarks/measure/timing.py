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
    """The number of rounds for a function of duration `once`, within its share of the time."""
    return min(repeats, max(FEWEST_ROUNDS, int(seconds / max(once, SHORTEST_SAMPLE))))


def alternate(
    steps: Mapping[str, Step],
    durations: Mapping[str, float],
    repeats: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float | None]]:
    """Times functions in turns and returns seconds per call by round.

    Each round begins with another function, and with a call of the round's last one that is not
    timed: who comes right after the garbage collector takes up to half as long again.

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
    names = list(steps)
    for turn in range(repeats):
        first = turn % len(names)
        order = [name for name in names[first:] + names[:first] if turn < rounds[name]]
        gc.collect()  # here, and not in a sample
        if order:
            steps[order[-1]]()  # so that the first one too finds what another function left behind
        for name in names:
            samples[name].append(None)
        for name in order:
            samples[name][-1] = _sample(steps[name], calls[name], clock)
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
