"""Each extra in an environment that has nothing else than it and one backend: `make test-extras`.

What one extra lacks, another one brings: where all are installed, nothing is seen of it. So for
each pair below a fresh virtual environment gets the wheel with that extra and one backend, at the
versions of `constraints.txt`, and does a small piece of the extra's work away from the source tree.
Then it is deleted. Packages come from the index that pip is set up for.

    python -m tests.packaging.extras          # all of them
    python -m tests.packaging.extras tuner    # one extra, with each of its backends
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
JOBS = Path(__file__).parent / "jobs"
TIMEOUT = 1200  # seconds


class Case(NamedTuple):
    """An environment and what it must do.

    Attributes:
        extra: the extra, or a backend alone.
        backend: the one backend beside it.
        command: a script and its arguments.
        is_legacy: whether `tf.keras` is Keras 2.
    """

    extra: str
    backend: str
    command: tuple[str, ...]
    is_legacy: bool = False


def job(name: str) -> tuple[str, ...]:
    return (str(JOBS / f"{name}.py"),)


def study(name: str, *arguments: str) -> tuple[str, ...]:
    """What needs all that the examples need, and can be made small."""
    return (str(ROOT / "examples" / "studies" / f"{name}.py"), *arguments, "--out", name)


IMAGES = (
    *("--dataset", "digits", "--seeds", "1", "--epochs", "2", "--steps-per-epoch", "5"),
    *("--batch-size", "16", "--width", "8", "--depth", "2", "--heads", "2", "--mlp-dim", "16"),
    *("--patch-size", "4"),
)
TEXT = (
    *("--seeds", "1", "--epochs", "2", "--steps-per-epoch", "4", "--batch-size", "4"),
    *("--context", "12", "--width", "8", "--depth", "1", "--heads", "2", "--mlp-dim", "16"),
    *("--experts", "2"),
)
CASES = (
    *(Case(backend, backend, job("train_layers")) for backend in ("jax", "tensorflow", "torch")),
    *(Case("tuner", backend, job("search_space")) for backend in ("jax", "tensorflow", "torch")),
    Case("plot", "jax", job("draw_pictures")),
    Case("tensorboard", "jax", job("write_events")),
    Case("tensorboard", "torch", job("write_events")),
    Case("tfrs", "tensorflow", job("bridge_to_keras_2"), True),
    Case("examples", "tensorflow", study("movies", "--quick"), True),
    Case("examples", "jax", study("images", *IMAGES)),
    Case("examples", "jax", study("text", *TEXT)),
    Case("examples", "jax", study("tune", "--quick", "--trials", "1", "--seeds", "1")),
)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    known = sorted({case.extra for case in CASES})
    parser.add_argument("extras", nargs="*", help=f"of {', '.join(known)} (default: all)")
    chosen = parser.parse_args(arguments).extras or known
    if not set(chosen) <= set(known):
        parser.error(f"extras must be of {known}. Received: {chosen}")
    print(f"{'extra':<12}{'backend':<12}{'seconds':>8}  result", flush=True)
    with tempfile.TemporaryDirectory(prefix="keras_moe_extras_") as folder:
        wheel = build_wheel(Path(folder))
        errors = [
            error
            for environment in environments(chosen)
            for error in check(wheel, environment, Path(folder) / "environment")
        ]
    print(f"{len(errors)} failed." if errors else "All is well.")
    return 1 if errors else 0


def environments(chosen: list[str]) -> list[list[Case]]:
    """The cases, those of one environment together."""
    found: dict[tuple[str, str], list[Case]] = {}
    for case in CASES:
        if case.extra in chosen:
            found.setdefault((case.extra, case.backend), []).append(case)
    return list(found.values())


def check(wheel: Path, cases: list[Case], folder: Path) -> list[str]:
    """Makes an environment, works in it, deletes it, and prints a line per case; returns errors."""
    extra, backend = cases[0][:2]
    errors, start = [], time.perf_counter()
    try:
        wanted = f"{wheel}[{','.join(sorted({extra, backend}))}]"
        missing = install([wanted], folder, ROOT / "constraints.txt")
        for case in cases:
            error = missing or work(case, folder)
            errors += [error] if error else []
            seconds, start = time.perf_counter() - start, time.perf_counter()
            name = Path(case.command[0]).stem
            print(f"{extra:<12}{backend:<12}{seconds:>8.0f}  {name}: {error or 'ok'}", flush=True)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return errors


def build_wheel(folder: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet"]
    subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(ROOT)],
        check=True,
    )
    (wheel,) = folder.glob("*.whl")
    return wheel


def install(requirements: list[str], folder: Path, constraints: Path) -> str:
    """Makes the environment; returns what went wrong."""
    pip = [str(folder / "bin" / "python"), "-m", "pip", "--disable-pip-version-check"]
    steps = (
        [sys.executable, "-m", "venv", str(folder)],
        [*pip, "install", "--quiet", "-c", str(constraints), *requirements],
        [*pip, "check"],
    )
    return next(filter(None, (run(step, folder.parent, {}) for step in steps)), "")


def work(case: Case, folder: Path) -> str:
    """Does the case's work in a folder of its own; returns what went wrong."""
    variables = {"KERAS_BACKEND": case.backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
    if case.is_legacy:
        variables["TF_USE_LEGACY_KERAS"] = "1"
    here = folder / "work"
    here.mkdir(exist_ok=True)
    return run([str(folder / "bin" / "python"), *case.command], here, variables)


def run(command: list[str], folder: Path, variables: dict[str, str]) -> str:
    """Runs a command; returns the end of what it said where it fails."""
    environment = {**os.environ, **variables}
    environment.pop("PYTHONPATH", None)  # the wheel, not the source tree
    try:
        process = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired:
        return f"took more than {TIMEOUT} seconds: {' '.join(command)}"
    if process.returncode == 0:
        return ""
    said = [line for line in (process.stdout + process.stderr).splitlines() if line.strip()]
    print("\n".join(said[-30:]), file=sys.stderr, flush=True)
    return said[-1] if said else f"exit status {process.returncode}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
