"""The Python in README.md and docs/ runs, and prints what the pages show."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("README.md"), *(ROOT / "docs").rglob("*.md")])

# Written against Keras 2, which a process cannot import beside Keras 3 under the same settings.
LEGACY_KERAS = {"tfrs_bridge.md", "recommend_movies.md"}

NO_RUN = "<!-- no-run"
_BLOCK = re.compile(
    r"(?P<marker><!--[^\n]*-->\n)?^```python\n(?P<code>.*?)^```$"
    r"(?:\n\n```text\n(?P<output>.*?)^```$)?",
    re.MULTILINE | re.DOTALL,
)
_DECIMAL = re.compile(r"-?\d+\.\d+(e[+-]?\d+)?|\bnan\b")


class Block(NamedTuple):
    """A fenced block, and the output shown right below it, if any."""

    code: str
    output: str | None
    line: int


def blocks_of(page: Path) -> list[Block]:
    """The blocks of a page that run."""
    text = page.read_text()
    return [
        Block(found["code"], found["output"], text.count("\n", 0, found.start("code")) + 1)
        for found in _BLOCK.finditer(text)
        if not (found["marker"] or "").startswith(NO_RUN)
    ]


def as_shown(output: str) -> list[str]:
    """Words of an output, without decimals: those depend on backend and processor."""
    return _DECIMAL.sub("#", output).split()


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


IN_PROCESS = [page for page in PAGES if page.name not in LEGACY_KERAS]
IN_SUBPROCESS = [page for page in PAGES if page.name in LEGACY_KERAS and blocks_of(page)]


@pytest.mark.parametrize("page", IN_PROCESS, ids=name_of)
def test_python_of_a_page_runs(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)  # pages may save files
    namespace = {"__name__": "__main__"}
    for block in blocks_of(page):
        padding = "\n" * (block.line - 1)  # tracebacks give the page's line numbers
        capsys.readouterr()
        exec(compile(padding + block.code, str(page), "exec"), namespace)
        printed = capsys.readouterr().out
        if block.output is not None:
            assert as_shown(printed) == as_shown(block.output), f"{page}:{block.line}"


@pytest.mark.parametrize("page", IN_SUBPROCESS, ids=name_of)
def test_python_of_a_keras_2_page_runs(page, tmp_path):
    script = tmp_path / "page.py"
    script.write_text("\n\n".join(block.code for block in blocks_of(page)))
    environment = {
        **os.environ,
        "KERAS_BACKEND": "tensorflow",
        "TF_USE_LEGACY_KERAS": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONPATH": str(ROOT),
    }
    result = subprocess.run(
        [sys.executable, str(script)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-2000:]


def test_blocks_are_found_with_their_output(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```python\nprint(1)\n```\n\n```text\n1\n```\n\n"
        "<!-- no-run: slow -->\n```python\nfail()\n```\n\n"
        "```python\nx = 2\n```\n\nWords.\n\n```text\n2\n```\n"
    )
    assert blocks_of(page) == [Block("print(1)\n", "1\n", 2), Block("x = 2\n", None, 15)]


def test_decimals_may_differ_and_words_may_not():
    assert as_shown("loss 0.51  [2]") == as_shown("loss 0.49 [2]")
    assert as_shown("loss 0.51 [2]") != as_shown("loss 0.51 [3]")


def test_pages_with_code_are_there():
    assert sum(bool(blocks_of(page)) for page in PAGES) >= 10
