"""Which checks every router passes on which backend: the table of docs/routers.md.

`python -m tests.router_checks` runs the tests below on the three backends, a process each, also
those cases that `make test` leaves to PyTorch, and writes what passed to
`tests/data/router_checks.json` and the page.
`tests/docs/test_router_table.py` fails where either is not what the tests of today cover.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "tests" / "data" / "router_checks.json"
PAGE = ROOT / "docs" / "routers.md"
BACKENDS = ("jax", "tensorflow", "torch")
CHECKS = ("values", "gradients", "masks", "jit", "save, load", "resume")
START, END = "<!-- router-checks: generated -->\n", "<!-- /router-checks -->\n"

# Test function -> the checks that each of its cases is, and what the case's id must say.
ORACLE = "tests.routers.test_router_oracles"
CONTRACT = "tests.layers.test_contract"
RESUME = "tests.routers.test_exact_resume"
TOKEN_HASH = "tests.routers.test_token_hash"
TESTS = {
    (ORACLE, "test_equals_its_oracle", ""): ("values", "gradients"),
    (ORACLE, "test_equals_its_oracle", "-masked"): ("masks",),
    (CONTRACT, "test_layer_contract", "padding_changes_nothing"): ("masks",),
    (CONTRACT, "test_fit", "True"): ("jit",),
    (CONTRACT, "test_save_and_load", ""): ("save, load",),
    (RESUME, "test_going_on_from_a_file_equals_going_on", ""): ("save, load", "resume"),
}
# The layer contract calls layers without token ids.
OWN_TESTS = {
    (TOKEN_HASH, "test_a_functional_model_trains_saves_and_loads"): ("TokenHashRouter", "jit"),
}
# torch compiles with inductor, a C++ compiler and minutes per layer.
NOT_RUN = {("jit", "torch")}

OTHERS = "(test_layer_contract and not padding_changes_nothing)"

Passed = dict[str, dict[str, list[str]]]


def routers_of(module: str) -> dict[str, str]:
    """Case id -> class of its router."""
    found = {}
    for name, case in importlib.import_module(module).CASES.items():
        made = case.make() if hasattr(case, "make") else case()
        router = getattr(made, "router", made)
        found[name] = type(router).__name__
    return found


def checks_of(module: str, test: str, case: str) -> Iterator[str]:
    """What a test's case shows, `case` being what stands in brackets in its id."""
    for (where, name, part), checks in TESTS.items():
        if (where, name) == (module, test) and part in case:
            yield from checks


def every_router() -> list[str]:
    """All routing rules of the package, by class name."""
    from keras_moe import routers

    return sorted(
        name
        for name, each in vars(routers).items()
        if isinstance(each, type)
        and issubclass(each, routers.Router)
        and name not in ("Router", "LinearRouter")
    )


def covered(backend: str) -> dict[str, list[str]]:
    """Router -> checks that the tests of today have for it: what must pass on this backend."""
    found: dict[str, set[str]] = {name: set() for name in every_router()}
    for (module, _, _), checks in TESTS.items():
        for router in routers_of(module).values():
            if router in found:
                found[router] |= {each for each in checks if (each, backend) not in NOT_RUN}
    for router, check in OWN_TESTS.values():
        found[router] |= {check} - {each for each, where in NOT_RUN if where == backend}
    return in_order(found)


def passed(report: Path, backend: str) -> dict[str, list[str]]:
    """Router -> checks whose every case passed, of a JUnit report."""
    found: dict[str, set[str]] = {name: set() for name in every_router()}
    failed: set[tuple[str, str]] = set()
    by_module = {module: routers_of(module) for module, _, _ in TESTS}
    for case in xml.parse(report).iter("testcase"):
        module, name = case.attrib["classname"], case.attrib["name"]
        test, _, inside = name.partition("[")
        is_passed = len(case) == 0 or all(child.tag == "properties" for child in case)
        shown = [OWN_TESTS[module, test]] if (module, test) in OWN_TESTS else []
        names = by_module.get(module, {})
        parts = re.split(r"[-\]]", inside)
        routers = {names[part] for part in parts if part in names}
        shown += [(router, each) for router in routers for each in checks_of(module, test, inside)]
        for router, check in shown:
            if router in found and (check, backend) not in NOT_RUN:
                found[router].add(check)
                if not is_passed:
                    failed.add((router, check))
    for router, check in failed:
        found[router].discard(check)
    return in_order(found)


def in_order(found: dict[str, set[str]]) -> dict[str, list[str]]:
    return {router: [each for each in CHECKS if each in checks] for router, checks in found.items()}


def run(backend: str) -> dict[str, list[str]]:
    """Runs the tests on a backend."""
    wanted = {f"{module.replace('.', '/')}.py::{test}" for module, test, _ in TESTS}
    wanted |= {f"{module.replace('.', '/')}.py::{test}" for module, test in OWN_TESTS}
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [
                *(sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", *sorted(wanted)),
                *("--everything", "-k", f"not (mmoe or soft or False or {OTHERS})"),
            ],
            cwd=ROOT,
            env={**os.environ, "KERAS_BACKEND": backend},
            check=False,
        )
        return passed(report, backend)


def table(results: Passed) -> str:
    """The table as Markdown; a cell names the backends that lack the check, if any."""
    lines = [f"| router | {' | '.join(CHECKS)} |", "|---" * (len(CHECKS) + 1) + "|"]
    for router in every_router():
        cells = [
            cell_of([b for b in BACKENDS if check in results[b].get(router, [])])
            for check in CHECKS
        ]
        lines.append(f"| `{router}` | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell_of(backends: list[str]) -> str:
    names = {"jax": "JAX", "tensorflow": "TensorFlow", "torch": "PyTorch"}
    if len(backends) == len(BACKENDS):
        return "yes"
    return ", ".join(names[backend] for backend in backends) or "-"


def on_page() -> str:
    """The table that the page shows."""
    return PAGE.read_text().split(START)[1].split(END)[0]


def write(results: Passed) -> None:
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    before, rest = PAGE.read_text().split(START)
    PAGE.write_text(before + START + "\n" + table(results) + "\n" + END + rest.split(END)[1])


if __name__ == "__main__":
    write({backend: run(backend) for backend in BACKENDS})
