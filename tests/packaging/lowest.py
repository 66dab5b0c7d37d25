"""The lowest versions that pyproject.toml claims, one backend at a time: `make test-lowest`.

A fresh virtual environment gets the wheel with one backend and what goes with it, each requirement
of pyproject.toml at the version behind its `>=`; what those bring in is the newest that they take.
It does the work of `jobs` away from the source tree, and runs the tests below in it. Then it is
deleted. The Python that runs this should be the lowest one too.

    python -m tests.packaging.lowest          # all backends
    python -m tests.packaging.lowest jax      # one
"""

import argparse
import re
import shutil
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable, Sequence
from pathlib import Path

from packaging.requirements import Requirement

from tests.packaging.extras import ROOT, Case, build_wheel, install, job, run, work

EXTRAS = ("tuner", "plot", "tensorboard")
JOBS = ("train_layers", "search_space", "draw_pictures", "write_events")
CONTRACT = "tests/layers/test_contract.py"
TESTS = (
    "tests/layers/test_values_and_gradients.py",
    *(f"{CONTRACT}::test_{name}" for name in ("fit", "fit_any_data", "save_and_load")),
    "tests/tuning/test_active_cost.py",
)
BRIDGE_TESTS = ("tests/integrations/test_tfrs.py", "-k", "loss or frozen or flag")
# What needs more than one backend, or what a lowest version has not: PyTorch's grouped matmul.
LEFT_OUT = {"jax": "_tf_data", "tensorflow": "", "torch": "_tf_data or grouped"}
TOOLS = (
    "hypothesis",
    "pytest",
    "pytest-xdist",
)  # ours, not a user's: at the versions of constraints.txt


def floors(project: dict) -> dict[str, str]:
    """The lowest version of each package that a user may have.

    Raises:
        ValueError: where two requirements on a package differ, or one has no `>=`.
    """
    extras = project["optional-dependencies"]
    named = [
        *project["dependencies"],
        *(r for name in extras if name != "dev" for r in extras[name]),
    ]
    found: dict[str, str] = {}
    for requirement in map(Requirement, named):
        if requirement.name == project["name"]:
            continue
        lowest = re.fullmatch(r">=([0-9.]+)", str(requirement.specifier))
        if lowest is None or found.setdefault(requirement.name, lowest[1]) != lowest[1]:
            raise ValueError(f"A requirement needs one and the same `>=`. Received: {requirement}")
    return found


def tools() -> list[str]:
    """The pins of what runs the tests."""
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    return [pin for pin in pins if pin.partition("==")[0] in TOOLS]


def check(backend: str, wheel: Path, constraints: Path, folder: Path) -> list[str]:
    """Makes an environment, works in it, deletes it, and prints a line per piece of work."""
    extras = [backend, *EXTRAS, *(["tfrs"] if backend == "tensorflow" else [])]
    cases = [Case(backend, backend, job(name)) for name in JOBS]
    if backend == "tensorflow":
        cases.append(Case(backend, backend, job("bridge_to_keras_2"), True))
    errors = []
    try:
        wanted = [f"{wheel}[{','.join(extras)}]", *tools()]
        errors += report(backend, "install", lambda: install(wanted, folder, constraints))
        if not errors:
            for case in cases:
                name = Path(case.command[0]).stem
                errors += report(backend, name, lambda case=case: work(case, folder))
            left_out = ("-k", f"not ({LEFT_OUT[backend]})") if LEFT_OUT[backend] else ()
            tests = (*TESTS, *left_out)
            errors += report(backend, "tests", lambda: run_tests(backend, folder, tests))
            if backend == "tensorflow":
                bridge = lambda: run_tests(backend, folder, BRIDGE_TESTS, legacy=True)  # noqa: E731
                errors += report(backend, "tests of the bridge", bridge)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return errors


def report(backend: str, name: str, do: Callable[[], str]) -> list[str]:
    """Does a piece of work and says how it went."""
    start = time.perf_counter()
    error = do()
    print(f"{backend:<12}{time.perf_counter() - start:>8.0f}  {name}: {error or 'ok'}", flush=True)
    return [error] if error else []


def run_tests(backend: str, folder: Path, tests: Sequence[str], legacy: bool = False) -> str:
    """Runs tests of the source tree; what old packages warn of is no error."""
    options = ("-n", "2", "-o", "filterwarnings=default", "-p", "no:cacheprovider")
    command = [str(folder / "bin" / "python"), "-m", "pytest", *options, *tests]
    variables = {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "2"}
    return run(command, ROOT, {**variables, "TF_USE_LEGACY_KERAS": "1"} if legacy else variables)


def main(arguments: list[str]) -> int:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    backends = ("jax", "tensorflow", "torch")
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("backends", nargs="*", help=f"of {', '.join(backends)} (default: all)")
    chosen = parser.parse_args(arguments).backends or backends
    if not set(chosen) <= set(backends):
        parser.error(f"backends must be of {list(backends)}. Received: {chosen}")
    pins = [f"{name}=={version}" for name, version in floors(project).items()]
    print(f"Python {sys.version.split()[0]}, {', '.join(pins)}", flush=True)
    with tempfile.TemporaryDirectory(prefix="keras_moe_lowest_") as folder:
        constraints = Path(folder) / "lowest.txt"
        constraints.write_text("\n".join(pins))
        wheel = build_wheel(Path(folder))
        errors = [
            error
            for backend in chosen
            for error in check(backend, wheel, constraints, Path(folder) / "environment")
        ]
    print(f"{len(errors)} failed." if errors else "All is well.")
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
