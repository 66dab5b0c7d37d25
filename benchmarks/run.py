"""Measures what a mixture of experts costs, against a dense layer that does the same work.

    python -m benchmarks.run                              # every row, every backend
    python -m benchmarks.run --backend jax torch --rows dropless decode
    python -m benchmarks.run --rows curve --dispatchers auto walk dense --peers
    python -m benchmarks.run --backend jax --rows gpu     # on a GPU, in bfloat16
    python -m benchmarks.run --quick                      # tiny sizes: does everything run?

Each backend runs in a process of its own. There, all that is compared takes turns: ours, the
reference, a peer, ours, ...; what is reported is the median over rounds of the ratio within a
round. "forward" is inference, "gradient" the gradient of the mean square of the outputs plus the
auxiliary losses by the inputs and all trainable weights, in training. Results are stored after
every row, in one file per machine and backend, in place of older ones of the same row.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import environment, show
from benchmarks.contender import Options
from benchmarks.engines import BACKENDS
from benchmarks.results import FOLDER, Store, path_of
from benchmarks.rows import ROWS, Row, select

# `benchmarks.ours` imports keras_moe, and with it a backend, which this process needs not.
DISPATCHERS = ("auto", "walk", "padded_blocks", "grouped", "lookup", "dense", "slots", "einsum")
_WIDTH = 160
_QUICK_REPEATS, _QUICK_SECONDS = 3, 0.3


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="default: all installed")
    parser.add_argument("--rows", nargs="+", metavar="ROW", help="names or groups, see --list")
    parser.add_argument("--list", action="store_true", help="print the rows and stop")
    parser.add_argument(
        "--dispatchers",
        nargs="+",
        choices=[*DISPATCHERS, "all"],
        default=["auto"],
        metavar="DISPATCHER",
        help=f"values of MoE(dispatch=) to compare: all, or some of {', '.join(DISPATCHERS)}",
    )
    parser.add_argument(
        "--peers",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="measure other libraries' layers too, where they are installed",
    )
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16", "mixed_bfloat16"], help="default: the row's"
    )
    parser.add_argument("--repeats", type=int, default=15, help="rounds (default: 15)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=20.0,
        help="about the most that a contender takes in one timing; a slow one takes part in fewer "
        "rounds, at least 3 (default: 20)",
    )
    parser.add_argument(
        "--row-limit",
        type=int,
        default=1800,
        help="seconds after which a row is given up, compiling included (default: 1800)",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes, for a look")
    parser.add_argument(
        "--out",
        type=Path,
        default=FOLDER,
        help="a folder, for <device>/<backend>.json in it, or a file, for one backend "
        "(default: benchmarks/results)",
    )
    parsed = parser.parse_args(arguments)
    try:
        parsed.selected = select(parsed.rows)
    except ValueError as error:
        parser.error(str(error))
    if parsed.repeats < 1:
        parser.error(f"--repeats must be at least 1. Received: {parsed.repeats}")
    parsed.backend = parsed.backend or installed_backends()
    if parsed.out.suffix == ".json" and len(parsed.backend) != 1:
        parser.error("--out names a file, so one --backend must be named too.")
    return parsed


def installed_backends() -> list[str]:
    """The backends whose packages are here."""
    return [name for name in BACKENDS if importlib.util.find_spec(name.partition("-")[0])]


def command_of(arguments: Sequence[str]) -> str:
    """The command as it is stored: without `--out`, whose path says nothing on other machines."""
    kept, skip = [], False
    for word in arguments:
        if not skip and word != "--out" and not word.startswith("--out="):
            kept.append(word)
        skip = word == "--out"
    return shlex.join(["python", "-m", "benchmarks.run", *kept])


def options_of(parsed: argparse.Namespace, backend: str) -> Options:
    dispatchers = (
        DISPATCHERS if "all" in parsed.dispatchers else tuple(dict.fromkeys(parsed.dispatchers))
    )
    return Options(
        backend=backend,
        dispatchers=dispatchers,
        peers=parsed.peers,
        repeats=min(parsed.repeats, _QUICK_REPEATS) if parsed.quick else parsed.repeats,
        seconds=_QUICK_SECONDS if parsed.quick else parsed.seconds,
        row_limit=parsed.row_limit,
        quick=parsed.quick,
    )


def run_backend(
    rows: list[Row], path: Path, header: dict[str, Any], options: Options, dtype: str | None
) -> dict[str, Any]:
    """Runs the rows in child processes until each has a result, and returns what is stored.

    A child that is killed, as by a lack of memory, costs the row it was in; the next child goes on
    with the rows after it.
    """
    while missing := [row.name for row in rows if row.name not in Store(path, header).done]:
        arguments = {
            "rows": missing,
            "out": str(path),
            "header": header,
            "options": dataclasses.asdict(options),
            "dtype": dtype,
        }
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.child", json.dumps(arguments)],
            env=child_environment(options),
        )
        store = Store(path, header)
        stopped_in = store.record.get("running")
        if stopped_in is None and not done.returncode:
            break
        message = f"The process ended with status {done.returncode}."
        store.end(stopped_in or missing[0], {"error": message})
    return Store(path, header).record


def child_environment(options: Options) -> dict[str, str]:
    """The variables that a backend reads when it starts."""
    return {
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",  # the time to compile is measured
        **os.environ,
        "KERAS_BACKEND": options.keras_backend,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    # A file or a pipe has no width: the table must not be cut to 80 columns there.
    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    if parsed.list:
        show.print_rows(console, ROWS)
        return 0
    now = datetime.datetime.now(datetime.UTC)
    date = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    command = command_of(sys.argv[1:] if arguments is None else arguments)
    any_failed = False
    for backend in parsed.backend:
        options = options_of(parsed, backend)
        header = {
            "date": date,
            "command": command,
            "backend": backend,
            "quick": parsed.quick,
            "repeats": options.repeats,
        }
        path = parsed.out
        if path.suffix != ".json":
            path = path_of(device_name(), backend, parsed.quick, folder=path)
        record = run_backend(parsed.selected, path, header, options, parsed.dtype)
        show.print_record(console, record)
        console.print(f"stored in {path}", soft_wrap=True)
        any_failed |= any("error" in row for row in record["rows"].values())
    return int(any_failed)


def device_name() -> str:
    """The GPU's name if the driver lists one, else the processor's."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return environment.cpu_name()


if __name__ == "__main__":
    sys.exit(main())
