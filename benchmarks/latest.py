"""Selection of the stored results that a table shows."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from benchmarks.engines import BACKENDS


class Machine(NamedTuple):
    """Machine that all results of one table share."""

    device: str
    cores: int
    dtype: str


class Latest(NamedTuple):
    """The newest results of one machine.

    Attributes:
        rows: by backend and row name.
        runs: by backend, the records that the rows are from, oldest first.
    """

    rows: dict[str, dict[str, Any]]
    runs: dict[str, list[dict[str, Any]]]

    @property
    def backends(self) -> list[str]:
        """Those with results, in the table's order."""
        return [backend for backend in BACKENDS if backend in self.rows]


def newest(records: Iterable[dict[str, Any]]) -> dict[Machine, Latest]:
    """The newest result of each row, backend and machine; quick runs and failures are left out.

    A row that failed in the newest run keeps its older numbers, which the run's date shows.

    Args:
        records: oldest first, as `results.read_all` gives them.

    Returns:
        What is newest by machine, that with the most rows first.
    """
    chosen: dict[Machine, dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]]] = {}
    for record in records:
        for name, row, machine in _measured(record):
            by_backend = chosen.setdefault(machine, {}).setdefault(record["backend"], {})
            by_backend[name] = (row, record)
    return {
        machine: Latest(
            {
                backend: {name: row for name, (row, _) in found.items()}
                for backend, found in by_backend.items()
            },
            {backend: _runs(found.values()) for backend, found in by_backend.items()},
        )
        for machine, by_backend in sorted(chosen.items(), key=_most_rows_first)
    }


def _most_rows_first(of_machine: tuple[Machine, dict[str, dict[str, Any]]]) -> tuple[int, Machine]:
    machine, by_backend = of_machine
    return -sum(map(len, by_backend.values())), machine


def without_stale_rows(
    older: Iterable[dict[str, Any]], latest: dict[str, Any]
) -> list[dict[str, Any]]:
    """The older runs without the rows that no table shows any more, and the latest run as it is.

    Args:
        older: runs of one backend, oldest first.
        latest: the run after them.
    """
    older = list(older)
    source = {
        (machine, name): record
        for record in [*older, latest]
        for name, _, machine in _measured(record)
    }
    kept = []
    for record in older:
        rows = {
            name: row for name, row, machine in _measured(record) if source[machine, name] is record
        }
        if rows:
            kept.append({**record, "rows": rows})
    return [*kept, latest]


def _measured(record: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], Machine]]:
    """The rows that have numbers, and where those were taken."""
    if record.get("quick"):
        return
    for name, row in record["rows"].items():
        if "lines" in row:
            device = record["device"]
            yield name, row, Machine(device["name"], device["cores"], row["dtype"])


def _runs(found: Iterable[tuple[dict[str, Any], dict[str, Any]]]) -> list[dict[str, Any]]:
    """The distinct records, oldest first."""
    by_date = {record["date"]: record for _, record in found}
    return [by_date[date] for date in sorted(by_date)]
