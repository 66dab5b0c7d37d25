"""Measures rows on one backend, in the process whose Keras backend it is.

`benchmarks.run` starts it: python -m benchmarks.child '{"rows": [...], "out": ..., ...}'.
"""

from __future__ import annotations

import contextlib
import json
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras

from benchmarks import engines, environment
from benchmarks.contender import Options
from benchmarks.measure.case import NotApplicable, first_line, measure_row
from benchmarks.results import Store
from benchmarks.rows import FORWARD, Row, Sizes, select


class RowTooLong(BaseException):
    """A row's time is up. No `Exception`, so that nobody takes it for a contender's failure."""


@contextlib.contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Raises `RowTooLong` in what runs longer than this."""

    def stop(*_: Any) -> None:
        raise RowTooLong(f"The row took longer than {seconds} s (--row-limit).")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_rows(
    rows: list[Row], store: Store, engine: engines.Engine, options: Options, dtype: str | None
) -> None:
    """Measures each row that has no result yet; one that fails is stored with its message."""
    for row in rows:
        if row.name in store.done:
            continue
        store.begin(row.name)
        start = time.perf_counter()
        used = dtype or row.dtype or "float32"
        keras.config.set_dtype_policy(used)
        keras.utils.set_random_seed(0)
        try:
            with time_limit(options.row_limit):
                result = measure_row(row.quick() if options.quick else row, engine, options)
        except NotApplicable as reason:
            result = {"group": row.group, "skipped": str(reason)}
        except (Exception, RowTooLong) as error:
            result = {"group": row.group, "error": first_line(error)}
        seconds = time.perf_counter() - start
        store.end(row.name, {**result, "dtype": used, "took_seconds": round(seconds, 1)})
        print(f"{options.backend}: {row.name}, {seconds:.0f} s", flush=True)
        if row.kind == "accelerator":
            _print_rates(result)


def _print_rates(result: dict[str, Any]) -> None:
    """Prints at once what a run that is cut off would not come to print."""
    sizes = Sizes(**result["sizes"]) if "sizes" in result else None
    for line in result.get("lines", ()):
        matmuls = 3 if "glu" in line["against"] else 2
        flops = 2 * sizes.tokens * sizes.top_k * sizes.width * sizes.hidden * matmuls
        rates = []
        for name in (line["subject"], line["against"]):
            seconds = line["measured"][name]["median"] / (1 if line["pass"] == FORWARD else 3)
            rates.append(f"{seconds * 1e3:.3f} ms, {flops / seconds / 1e12:.0f} TFLOP/s")
        print(
            f"  {line['pass']:8s} {line['subject']} / {line['against']}: "
            f"{line['ratio']['median']:.2f} ({' / '.join(rates)} per matmul pass)",
            flush=True,
        )
    for failure in [*result.get("failures", ()), *([result] if "error" in result else ())]:
        print(f"  {failure}", flush=True)


def main(arguments: dict[str, Any]) -> None:
    options = Options(**arguments["options"])
    engine = engines.get(options.backend)
    store = Store(Path(arguments["out"]), arguments["header"])
    store.update(**environment.describe(engine.device()))
    run_rows(select(arguments["rows"]), store, engine, options, arguments["dtype"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
