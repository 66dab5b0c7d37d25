"""Check that two searches do not share a folder."""

import dataclasses
import inspect
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from keras_moe.core import checks

_RECORD = "search.json"


def check_project(directory: str | os.PathLike[str], project_name: str, **search: Any) -> None:
    """Checks that a results folder is new or belongs to this search, and claims it if it is new.

    A KerasTuner with `overwrite=False` resumes any search that its folder holds, and mixes the
    trials of two spaces or objectives without a word. Call this before making the tuner: it writes
    what defines the search to `search.json` in the project's folder, and fails where the folder
    holds something else. It changes nothing there. In place of `overwrite=True`, which removes
    `search.json` too, delete the folder.

    Args:
        directory: The tuner's `directory`.
        project_name: The tuner's `project_name`.
        **search: What defines the search and must be the same on resuming: JSON-like values,
            classes, functions (by name), and objects with `get_config()`, such as this package's
            hypermodels and `ActiveCost`. Leave out `max_trials`, which may grow.

    Raises:
        ValueError: where the folder holds another search, or a value cannot be written down.

    Example:

    >>> import tempfile
    >>> from keras_moe import tuning
    >>> folder = tempfile.mkdtemp()
    >>> tuning.check_project(folder, "digits", data="digits", objective="val_loss")
    >>> tuning.check_project(folder, "digits", data="digits", objective="val_loss")  # to resume
    """
    folder = Path(directory) / project_name
    record = folder / _RECORD
    described = json.loads(json.dumps(_described(search)))
    if record.exists():
        differing = _differences(_stored(record), described)
        if differing:
            _fail(folder, f"another search, which differs in {', '.join(differing)}", project_name)
    elif (folder / "oracle.json").exists() or any(folder.glob("trial_*")):
        _fail(folder, f"trials of an unknown search (there is no {_RECORD})", project_name)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        # Whole or not at all, also when killed in between.
        partial = record.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text(json.dumps(described, indent=2, sort_keys=True))
        os.replace(partial, record)


def _fail(folder: Path, held: str, project_name: str) -> None:
    checks.fail(
        f"`project_name` must be new, or that of the search to resume, but {str(folder)!r} holds "
        f"{held}. Nothing was changed there. Choose another `project_name`, or delete the folder.",
        project_name=project_name,
    )


def _stored(record: Path) -> Any:
    try:
        return json.loads(record.read_text())
    except ValueError:
        return None


def _described(value: Any, path: str = "") -> Any:
    """A JSON value that is equal in another process for an equal search."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {str(key): _described(entry, f"{path}.{key}") for key, entry in value.items()}
    if isinstance(value, list | tuple | range):
        return [_described(entry, f"{path}[{index}]") for index, entry in enumerate(value)]
    if inspect.isclass(value) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    kind = type(value).__qualname__
    if callable(getattr(value, "get_config", None)):
        return {"class": kind, "config": _described(value.get_config(), path)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"class": kind, "config": _described(fields, path)}
    checks.fail(
        f"`{path.lstrip('.')}` must be a JSON-like value, a class, a function, or an object with "
        "`get_config()`.",
        value=value,
    )


def _differences(stored: Any, described: Any, path: str = "") -> list[str]:
    """The paths at which two JSON values differ."""
    if isinstance(stored, dict) and isinstance(described, dict):
        return [
            difference
            for key in sorted({*stored, *described})
            for difference in _differences(
                stored.get(key), described.get(key), f"{path}.{key}" if path else key
            )
        ]
    return [] if stored == described else [path or _RECORD]
