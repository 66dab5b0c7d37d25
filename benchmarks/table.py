"""Writes the measured tables of docs/benchmarks.md, and their chart, from the stored results.

    python -m benchmarks.table           # rewrite both
    python -m benchmarks.table --check   # is the table what the results say? 1 if not

The tables stand between two marks there; nothing else there is touched. The same results
give the same text. The chart is not checked: its bytes depend on matplotlib's version.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.contender import OURS
from benchmarks.latest import Latest, Machine, newest
from benchmarks.rows import PASSES, ROWS, Row

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
_ROOT = Path(__file__).parent.parent
PAGE = _ROOT / "docs" / "benchmarks.md"
CHART = Path("docs/img/benchmarks_ratio_vs_experts.png")

BACKEND_NAMES = {
    "jax": "JAX",
    "tensorflow": "TF graph",
    "tensorflow-xla": "TF XLA",
    "torch": "torch",
    "torch-compile": "torch.compile",
}
_PASS_NAMES = {"forward": "fwd", "gradient": "fwd+bwd"}
_NOTHING = "-"


def between_marks(page: str, table: str) -> str:
    """The page with the table between the marks.

    Raises:
        ValueError: if it has not each mark exactly once, in order.
    """
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.find(BEGIN) > page.find(END):
        raise ValueError(
            f"The page must hold the lines {BEGIN!r} and {END!r} once each, in this order: the "
            "table goes between them."
        )
    before, _, rest = page.partition(BEGIN)
    after = rest.partition(END)[2]
    return f"{before}{BEGIN}\n\n{table.strip()}\n\n{END}{after}"


def render(records: Sequence[dict[str, Any]]) -> str:
    """The text for the page: per machine, targets and, if any, peers, and what was run."""
    machines = newest(records)
    if not machines:
        return "No results are stored yet: `python -m benchmarks.run` makes them."
    parts = []
    for machine, latest in machines.items():
        parts.append(_headline(machine, latest))
        for block in (_targets(latest), _others(latest), _runs(latest)):
            if block:
                parts.append(block)
    return "\n\n".join(parts)


def _headline(machine: Machine, latest: Latest) -> str:
    dates = sorted(run["date"][:10] for runs in latest.runs.values() for run in runs)
    when = " to ".join(dict.fromkeys([dates[0], dates[-1]]))
    return f"**{machine.device}, {machine.cores} cores, {machine.dtype}, {when}.**"


def _runs(latest: Latest) -> str:
    """The commands that measured the rows, with versions and commits."""
    lines = []
    for backend in latest.backends:
        for run in latest.runs[backend]:
            versions = run["versions"]
            names = ("keras", *{"jax": ["jax"], "torch": ["torch"]}.get(backend.split("-")[0], ()))
            if backend.startswith("tensorflow"):
                names = ("keras", "tensorflow")
            listed = ", ".join(f"{name} {versions[name]}" for name in names if name in versions)
            commit = run.get("commit", {})
            state = ", with changes" if commit.get("dirty") else ""
            lines.append(
                f"- {BACKEND_NAMES[backend]}: {run['date'][:10]}, commit "
                f"{commit.get('hash', 'unknown')[:10]}{state}, {listed}, `{run['command']}`."
            )
    return _folded("What was run", "\n".join(lines))


def _targets(latest: Latest) -> str:
    """A line per row, comparison and pass that has a target."""
    body = []
    for row in ROWS:
        for (against,) in _order(latest, row, lambda line: line["limit"] is not None, "against"):
            for which in PASSES:
                lines = {
                    backend: _line(latest, backend, row, OURS, against, which)
                    for backend in latest.backends
                }
                limits = [line["limit"] for line in lines.values() if line and line["limit"]]
                if limits:
                    cells = [_cell(lines[backend]) for backend in latest.backends]
                    target = f"{limits[0]:g}"
                    body.append(
                        [_title(row, against), row.sizes.label, _PASS_NAMES[which], target, *cells]
                    )
    header = ["what", "T, d, h, E, k", "pass", "target", *_names(latest)]
    return _markdown(header, body) if body else ""


def _title(row: Row, against: str) -> str:
    """The row's title, or where it names no reference, the title and what it is against."""
    return row.title if " / " in row.title else f"{row.title} / {against}"


def _others(latest: Latest) -> str:
    """A line per comparison without a target: other dispatchers, other libraries."""
    body = []
    for row in ROWS:
        what = row.title.rpartition(" / ")[0] or row.title
        for pair in _order(latest, row, lambda line: line["limit"] is None, "subject", "against"):
            cells = [_both(latest, backend, row, *pair) for backend in latest.backends]
            body.append([*pair, what, row.sizes.label, *cells])
    if not body:
        return ""
    header = ["who", "against", "row", "T, d, h, E, k", *_names(latest)]
    lead = (
        "Other dispatchers, and other libraries' layers on the same work: forward / "
        "forward+backward. "
        "Gated layers are compared with a gated dense one; `keras_moe glu` is ours, gated too."
    )
    return _folded("Peers and dispatchers", lead, _markdown(header, body))


def _order(
    latest: Latest, row: Row, wanted: Callable[[dict[str, Any]], bool], *fields: str
) -> list[tuple[str, ...]]:
    """The values of some fields of the wanted lines, in the order in which they were stored."""
    values = [
        tuple(line[field] for field in fields)
        for backend in latest.backends
        for line in latest.rows[backend].get(row.name, {}).get("lines", [])
        if wanted(line)
    ]
    return list(dict.fromkeys(values))


def _line(
    latest: Latest, backend: str, row: Row, subject: str, against: str, which: str
) -> dict[str, Any] | None:
    for line in latest.rows[backend].get(row.name, {}).get("lines", []):
        if (line["subject"], line["against"], line["pass"]) == (subject, against, which):
            return line
    return None


def _both(latest: Latest, backend: str, row: Row, subject: str, against: str) -> str:
    lines = [_line(latest, backend, row, subject, against, which) for which in PASSES]
    if not any(lines):
        return _NOTHING
    return " / ".join(f"{line['ratio']['median']:.2f}" if line else _NOTHING for line in lines)


def _cell(line: dict[str, Any] | None) -> str:
    """A ratio; bold with the excess where it misses its target."""
    if line is None:
        return _NOTHING
    ratio = line["ratio"]["median"]
    if line["met"]:
        return f"{ratio:.2f}"
    return f"**{ratio:.2f}** (+{100 * (ratio / line['limit'] - 1):.0f} %)"


def _names(latest: Latest) -> list[str]:
    return [BACKEND_NAMES[backend] for backend in latest.backends]


def _folded(summary: str, *blocks: str) -> str:
    # Without `markdown`, the site shows the tables in it as they are written.
    opening = f'<details markdown="1"><summary>{summary}</summary>'
    return "\n\n".join([opening, *blocks, "</details>"])


def _markdown(header: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    rows = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if out of date")
    parser.add_argument("--results", type=Path, default=results.FOLDER, help="a folder of results")
    parser.add_argument("--page", type=Path, default=PAGE, help="the file with the marks")
    parser.add_argument("--chart", type=Path, default=_ROOT / CHART, help="where the chart goes")
    parsed = parser.parse_args(arguments)
    try:
        records = results.read_all(parsed.results.glob("*/*.json"))
        before = parsed.page.read_text(encoding="utf-8")
        after = between_marks(before, render(records))
    except (OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    if parsed.check:
        if before == after:
            return 0
        say = f"{parsed.page.name} is out of date: run `python -m benchmarks.table`."
        print(say, file=sys.stderr)
        return 1
    parsed.page.write_text(after, encoding="utf-8")
    from benchmarks.chart import draw  # matplotlib is needed here only

    if draw(newest(records), parsed.chart):
        print(f"wrote {parsed.chart.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
