"""Writers of a monitor's numbers: comma-separated values, JSON lines, TensorBoard."""

import csv
import json
import socket
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from keras_moe.core.optional import import_of_extra

Row = dict[str, Any]


class Writer(Protocol):
    """Takes a row of numbers at the end of each epoch."""

    def write(self, epoch: int, scalars: dict[str, float], details: Row) -> None:
        """Writes an epoch.

        Args:
            epoch: from 0.
            scalars: by `{layer}/{metric}`.
            details: by layer, what was counted, lists of numbers too.
        """
        ...

    def close(self) -> None:
        """Closes the file."""
        ...


class CsvWriter:
    """A line per epoch and a column per scalar.

    Args:
        path: the file.
        first: the first epoch that will be written; of a file that is there, those before stay.
    """

    def __init__(self, path: Path, first: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows: list[Row] = []
        if first and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                self._rows = [row for row in csv.DictReader(file) if int(row["epoch"]) < first]
        self._file = path.open("w", newline="", encoding="utf-8")
        self._columns: list[str] = []
        self._write_all()

    def write(self, epoch: int, scalars: dict[str, float], details: Row) -> None:
        row: Row = {"epoch": epoch, **scalars}
        self._rows.append(row)
        if set(row) <= set(self._columns):
            self._writer.writerow(row)
        else:  # the first row, or a number that is new
            self._write_all()
        self._file.flush()

    def _write_all(self) -> None:
        self._columns = list(dict.fromkeys(name for row in self._rows for name in row))
        self._file.seek(0)
        self._file.truncate()
        self._writer = csv.DictWriter(self._file, self._columns, lineterminator="\n")
        if self._rows:
            self._writer.writeheader()
            self._writer.writerows(self._rows)

    def close(self) -> None:
        self._file.close()


class JsonWriter:
    """A JSON object per line and epoch, with all that was counted.

    Args:
        path: the file.
        first: the first epoch that will be written; of a file that is there, those before stay.
    """

    def __init__(self, path: Path, first: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        lines: list[str] = []
        if first and path.exists():
            lines = path.read_text(encoding="utf-8").splitlines()
        self._file = path.open("w", encoding="utf-8")
        self._file.writelines(line + "\n" for line in lines if json.loads(line)["epoch"] < first)
        self._file.flush()

    def write(self, epoch: int, scalars: dict[str, float], details: Row) -> None:
        self._file.write(json.dumps({"epoch": epoch, **scalars, "counts": details}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def needed_of_tensorboard() -> Callable[[str], Any]:
    """Returns what imports a part of TensorBoard, or says how to install it."""
    return partial(import_of_extra, "tensorboard", "`ExpertMonitor(log_dir=...)`")


class TensorBoardWriter:
    """An event file of scalars, written without TensorFlow.

    `keras.callbacks.TensorBoard` imports TensorFlow on every backend, and TensorBoard's own writer
    does where it is installed.

    Args:
        folder: the folder, where each training adds a file.
        first: the first epoch that will be written, which the file does not need.
    """

    def __init__(self, folder: Path, first: int) -> None:
        needed = needed_of_tensorboard()
        self._event = needed("tensorboard.compat.proto.event_pb2").Event
        self._summary = needed("tensorboard.compat.proto.summary_pb2").Summary
        make_writer = needed("tensorboard.summary.writer.record_writer").RecordWriter
        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.experts"
        self._file = (folder / name).open("wb")
        self._records = make_writer(self._file)
        self._add(self._event(wall_time=time.time(), file_version="brain.Event:2"))

    def write(self, epoch: int, scalars: dict[str, float], details: Row) -> None:
        values = [
            self._summary.Value(tag=tag, simple_value=value) for tag, value in scalars.items()
        ]
        summary = self._summary(value=values)
        self._add(self._event(wall_time=time.time(), step=epoch, summary=summary))

    def _add(self, event: Any) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()

    def close(self) -> None:
        self._file.close()
