"""Every test that docs/traps.md names is there, and runs on every backend."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|\n").split("|")]
    for line in (ROOT / "docs" / "traps.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| trap ")
]
SKIPS = re.compile(r"pytest\.(mark\.)?(skip|skipif|xfail|importorskip)\b")
NAMED = sorted({test for row in ROWS for test in re.findall(r"`(tests/[^`]+)`", row[-1])})


def function_of(test):
    path, name = test.split("::")
    tree = ast.parse((ROOT / path).read_text())
    found = [each for each in tree.body if getattr(each, "name", None) == name]
    assert found, f"There is no {test}."
    return found[0]


@pytest.mark.parametrize("trap, caught, tests", ROWS, ids=[row[0] for row in ROWS])
def test_every_trap_has_a_test(trap, caught, tests):
    assert "`tests/" in tests


@pytest.mark.parametrize("test", NAMED)
def test_no_trap_is_skipped(test):
    """MegaBlocks' tests do not run on the versions that it pins."""
    function = function_of(test)
    assert not SKIPS.search(ast.unparse(function))
    assert any(isinstance(node, ast.Assert | ast.Call) for node in ast.walk(function))


def test_the_page_has_them_all():
    assert len(ROWS) >= 30 and len(NAMED) >= 30
