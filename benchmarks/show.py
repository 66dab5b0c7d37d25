"""Results in a terminal."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.rows import ROWS, Row


def print_rows(console: Console, rows: Iterable[Row]) -> None:
    """Prints the rows with their targets."""
    table = Table("row", "T, d, h, E, k", "what", "target forward / gradient")
    for row in rows:
        limits = " / ".join(str(row.limits.get(which, "-")) for which in ("forward", "gradient"))
        table.add_row(row.name, row.sizes.label, row.title, limits)
    console.print(table)


def verdict(line: dict[str, Any]) -> str:
    """Whether a target was met, or by how much it was missed."""
    limit = line["limit"]
    if limit is None:
        return ""
    if line["met"]:
        return "met"
    return f"missed by {100 * (line['ratio']['median'] / limit - 1):.0f} %"


def print_record(console: Console, record: dict[str, Any]) -> None:
    """Prints the results of one run on one backend, with their conditions."""
    device, versions = record.get("device", {}), record.get("versions", {})
    console.print(f"$ {record['command']}", soft_wrap=True, highlight=False)
    head = record.get("commit", {})
    console.print(
        f"{record['backend']} on {device.get('name')}, {device.get('cores')} cores, "
        f"load {device.get('load_before')}; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + f"; commit {head.get('hash', 'unknown')[:10]}{' (changed)' * head.get('dirty', False)}; "
        + record["date"],
        soft_wrap=True,
        highlight=False,
    )
    table = Table(
        "row",
        "pass",
        "who",
        "against",
        "ratio",
        "quartiles",
        "n",
        "target",
        "",
        title=("tiny sizes: these numbers mean nothing" if record["quick"] else None),
    )
    for row in ROWS:
        for line in record["rows"].get(row.name, {}).get("lines", []):
            table.add_row(*_cells(row.name, line))
    console.print(table)
    for name, result in record["rows"].items():
        if "skipped" in result:
            console.print(f"{name} left out: {result['skipped']}", markup=False)
        if "error" in result:
            console.print(f"{name} failed: {result['error']}", markup=False, style="red")
        for failure in result.get("failures", []):
            console.print(
                f"{name}, {failure['contender']}, {failure['pass']}: {failure['message']}",
                markup=False,
                style="yellow",
            )


def _cells(name: str, line: dict[str, Any]) -> list[str]:
    ratio, limit = line["ratio"], line["limit"]
    return [
        name,
        line["pass"],
        line["subject"].replace("[", r"\["),
        line["against"].replace("[", r"\["),
        f"{ratio['median']:.2f}",
        f"{ratio['lower_quartile']:.2f}-{ratio['upper_quartile']:.2f}",
        str(ratio["n"]),
        "" if limit is None else f"{limit:g}",
        verdict(line),
    ]
