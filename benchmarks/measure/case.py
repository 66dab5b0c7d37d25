"""Measurement of one row."""

from __future__ import annotations

import dataclasses
import gc
import os
from collections.abc import Callable
from typing import Any

from benchmarks.contender import Case, Contender, Options
from benchmarks.engines import Engine, Step
from benchmarks.kinds import build_case
from benchmarks.measure import compile_time, memory, timing
from benchmarks.rows import Row
from benchmarks.statistics import Summary, paired_ratio, summarize

_COMPILE_REPEATS = 3
_MEMORY_REPEATS = 9  # TensorFlow's threads hold more or less at once: a third more in some steps
_SHARE_OF_MEMORY = 0.6  # a contender that is known to need more is left out

Samples = dict[str, list[float | None]]


class NotApplicable(Exception):
    """The row has no meaning on this backend, which is no failure."""


@dataclasses.dataclass
class Layers:
    """The contenders' layers, made once each; what fails is noted, and the others go on."""

    contenders: dict[str, Contender]
    failures: list[dict[str, str]] = dataclasses.field(default_factory=list)
    made: dict[str, Any] = dataclasses.field(default_factory=dict)

    def for_each(self, which: str, use: Callable[[str, Contender, Any], None]) -> None:
        """Calls `use(name, contender, layer)` for all contenders that are still in."""
        for name, contender in list(self.contenders.items()):
            try:
                _check_memory(contender)
                if name not in self.made:
                    self.made[name] = contender.make()
                use(name, contender, self.made[name])
            except Exception as error:
                self.fail(name, which, error)

    def fail(self, name: str, which: str, error: Exception) -> None:
        """Notes that a contender has no result in a pass."""
        failure = {"contender": name, "pass": which, "message": first_line(error)}
        if failure not in self.failures:  # what is repeated fails again
            self.failures.append(failure)


def first_line(error: BaseException) -> str:
    """The first line of an error, short enough for a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"[:300]


def measure_row(row: Row, engine: Engine, options: Options) -> dict[str, Any]:
    """Measures a row: sizes, facts, and a line per comparison and pass."""
    case = build_case(row, options)
    on_accelerator = row.kind == "accelerator"
    layers = Layers({contender.name: contender for contender in case.contenders})
    measure = {"memory": _memory, "compile": _compile}.get(row.kind, _times)
    lines = []
    peaks: dict[str, dict[str, int]] = {}
    for which in case.passes:
        samples = measure(row, layers, engine, which, options)
        lines += _lines(case, which, samples, layers)
        gc.collect()
        if on_accelerator:
            peaks[which] = _peaks(layers, engine, which)
    return {
        "group": row.group,
        "sizes": row.sizes._asdict(),
        "capacity_factor": row.capacity_factor,
        "facts": {**case.facts, **({"step_bytes": peaks} if peaks else {})},
        "lines": lines,
        "failures": layers.failures,
    }


def _times(row: Row, layers: Layers, engine: Engine, which: str, options: Options) -> Samples:
    del row
    steps: dict[str, Step] = {}
    durations: dict[str, float] = {}

    def warm(name: str, contender: Contender, layer: Any) -> None:
        step = engine.step(layer, contender, which)
        durations[name] = timing.warm_up(step)
        steps[name] = step

    layers.for_each(which, warm)
    return timing.alternate(steps, durations, options.repeats, options.seconds)


def _memory(row: Row, layers: Layers, engine: Engine, which: str, options: Options) -> Samples:
    samples: Samples = {name: [] for name in layers.contenders}

    def take(name: str, contender: Contender, layer: Any) -> None:
        size = engine.memory(layer, contender, which)
        if size is None:
            size = memory.measure_in_child(row.name, contender, which, options)
        samples[name].append(float(size))

    for _ in range(min(options.repeats, _MEMORY_REPEATS)):
        layers.for_each(which, take)
        if all(len(sizes) > 1 and sizes[-1] == sizes[-2] for sizes in samples.values()):
            break  # what a compiler reserves is the same each time
    return samples


def _peaks(layers: Layers, engine: Engine, which: str) -> dict[str, int]:
    """Bytes that a step takes beyond weights, inputs and gradients, where the engine knows."""
    peaks: dict[str, int] = {}

    def take(name: str, contender: Contender, layer: Any) -> None:
        size = engine.memory(layer, contender, which)
        if size is not None:
            peaks[name] = size

    layers.for_each(which, take)
    return peaks


def _compile(row: Row, layers: Layers, engine: Engine, which: str, options: Options) -> Samples:
    del row
    if not engine.compiles:
        raise NotApplicable("This backend compiles nothing.")
    samples: Samples = {name: [] for name in layers.contenders}

    def take(name: str, contender: Contender, layer: Any) -> None:
        seconds = compile_time.compile_seconds(engine, lambda: engine.step(layer, contender, which))
        samples[name].append(seconds)

    for _ in range(min(options.repeats, _COMPILE_REPEATS)):
        layers.for_each(which, take)
    return samples


def _lines(case: Case, which: str, samples: Samples, layers: Layers) -> list[dict[str, Any]]:
    """One record per comparison; what failed, or was compared with what failed, has none."""
    lines = []
    for subject, against, limits in case.comparisons:
        if not samples.get(subject) or not samples.get(against):
            continue
        try:
            ratio = paired_ratio(samples[subject], samples[against])
            measured = {name: _summary(samples[name])._asdict() for name in (subject, against)}
        except ValueError as error:
            layers.fail(subject, which, error)
            continue
        limit = limits.get(which)
        lines.append(
            {
                "pass": which,
                "subject": subject,
                "against": against,
                "ratio": ratio._asdict(),
                "measured": measured,
                "limit": limit,
                "met": None if limit is None else ratio.median <= limit,
            }
        )
    return lines


def _summary(samples: list[float | None]) -> Summary:
    return summarize([sample for sample in samples if sample is not None])


def _check_memory(contender: Contender) -> None:
    """Leaves a contender out before it brings the machine down."""
    memory_here = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if contender.peak_bytes > _SHARE_OF_MEMORY * memory_here:
        raise MemoryError(
            f"left out: it would hold {contender.peak_bytes / 2**30:.0f} GiB at once, of the "
            f"{memory_here / 2**30:.0f} GiB here"
        )
