"""Stored results: a JSON file per machine and backend, whole after every row."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.latest import without_stale_rows

FOLDER = Path(__file__).parent / "results"
_FORMAT = 2


def path_of(device: str, backend: str, quick: bool, folder: Path = FOLDER) -> Path:
    """The file of a machine and a backend: `<folder>/<device>/<backend>.json`.

    Args:
        device: the device's name.
        backend: one of the benchmark's backends.
        quick: quick results are kept apart, and no table shows them.
        folder: where results are kept.
    """
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return folder / slug / f"{backend}{'_quick' if quick else ''}.json"


class Store:
    """The results of one run in the file of its machine and backend, beside those of older runs.

    A process that is killed loses the row it is in. From older runs the file keeps what no newer
    run measured.

    Args:
        path: the file.
        header: date, command and all that holds for every row. The date tells runs apart.

    Raises:
        ValueError: on a file that holds no results.
    """

    def __init__(self, path: Path, header: dict[str, Any]) -> None:
        self.path = path
        runs = read(path) if path.exists() else []
        stored = next((run for run in runs if run["date"] == header["date"]), {"rows": {}})
        self._older = [run for run in runs if run is not stored]
        self.record: dict[str, Any] = {**stored, **header}

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
        runs = without_stale_rows(self._older, self.record)
        text = json.dumps({"format": _FORMAT, "runs": runs}, indent=1, sort_keys=True)
        whole.write_text(text + "\n")
        os.replace(whole, self.path)  # a reader sees the old file or the new one


def read(path: Path) -> list[dict[str, Any]]:
    """The runs in a file, oldest first.

    Raises:
        ValueError: on a file that holds no results.
    """
    try:
        stored = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path.name} is no JSON file: {error}") from error
    runs = stored.get("runs", [])
    if stored.get("format") != _FORMAT or not all(
        {"rows", "date", "backend"} <= set(r) for r in runs
    ):
        raise ValueError(f"{path.name} holds no benchmark results.")
    return sorted(runs, key=lambda run: run["date"])


def read_all(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """The runs in these files, oldest first.

    Raises:
        ValueError: on a file that holds no results.
    """
    runs = [run for path in sorted(paths) for run in read(path)]
    return sorted(runs, key=lambda run: run["date"])
