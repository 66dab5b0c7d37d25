"""Writers of a monitor's numbers: comma-separated values, JSON lines, TensorBoard."""

import csv
import json
import socket
import time
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
    """A line per epoch and a column per scalar."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", newline="", encoding="utf-8")
        self._writer: csv.DictWriter[str] | None = None

    def write(self, epoch: int, scalars: dict[str, float], details: Row) -> None:
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, ["epoch", *scalars], lineterminator="\n")
            self._writer.writeheader()
        self._writer.writerow({"epoch": epoch, **scalars})
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class JsonWriter:
    """A JSON object per line and epoch, with all that was counted."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("w", encoding="utf-8")

    def write(self, epoch: int, scalars: dict[str, float], details: Row) -> None:
        self._file.write(json.dumps({"epoch": epoch, **scalars, "counts": details}) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class TensorBoardWriter:
    """An event file of scalars, written without TensorFlow.

    `keras.callbacks.TensorBoard` imports TensorFlow on every backend, and TensorBoard's own writer
    does where it is installed.
    """

    def __init__(self, folder: Path) -> None:
        needed = partial(import_of_extra, "tensorboard", "`ExpertMonitor(log_dir=...)`")
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
