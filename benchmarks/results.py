"""Stored results: a JSON file per run and backend, whole after every row."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "results"


def default_path(date: str, device: str, backend: str, quick: bool) -> Path:
    """Where a run's results go: `<date>_<device>_<backend>.json`.

    Args:
        date: ISO 8601 in UTC, `2026-01-31T12:00:00Z`.
        device: the device's name.
        backend: one of the benchmark's backends.
        quick: quick results are kept apart, and no table shows them.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    name = f"{date.replace(':', '')}_{slug}_{backend}{'_quick' if quick else ''}.json"
    return FOLDER / name


class Store:
    """The results of one run on one backend; a process that is killed loses the row it is in.

    Args:
        path: the file. What it holds already is kept.
        header: date, command and all that holds for every row.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        self.record: dict[str, Any] = {"rows": {}}
        if path.exists():
            self.record = json.loads(path.read_text())
        self.record = {**self.record, **header}

    @property
    def done(self) -> set[str]:
        """The rows that were measured, or failed."""
        return set(self.record["rows"])

    def begin(self, row: str) -> None:
        """Notes which row is under way, so that a killed process leaves word of it."""
        self.record["running"] = row
        self._write()

    def end(self, row: str, result: dict[str, Any]) -> None:
        """Stores a row's result."""
        self.record.pop("running", None)
        self.record["rows"][row] = result
        self._write()

    def update(self, **header: Any) -> None:
        """Adds what holds for every row."""
        self.record |= header
        self._write()

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self.path.with_suffix(".json.part")
        whole.write_text(json.dumps(self.record, indent=1, sort_keys=True) + "\n")
        os.replace(whole, self.path)  # a reader sees the old file or the new one


def read_all(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The records in these files, oldest first.

    Raises:
        ValueError: on a file that holds no results.
    """
    records = []
    for path in sorted(paths):
        try:
            record = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path.name} is no JSON file: {error}") from error
        if not {"rows", "date", "backend"} <= set(record):
            raise ValueError(f"{path.name} holds no benchmark results.")
        records.append(record)
    return sorted(records, key=lambda record: record["date"])
