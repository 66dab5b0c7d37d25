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
from keras_moe.core.types import Config
from keras_moe.tuning._keras_tuner import import_keras_tuner

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
            classes, functions (by name), and objects with `get_config()`, such as `ActiveCost`.
            A hypermodel is written down with its search space, so that another one is seen: a
            `keras_tuner.HyperModel`, or a function that takes `hp`. It is built as the tuner builds
            it, once, and once more for each conditional scope. Leave out `max_trials`, which may
            grow.

    Raises:
        ValueError: where the folder holds another search, or a value cannot be written down.
        ImportError: on a hypermodel, where keras-tuner is missing.

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
    if _is_hypermodel(value, path):
        return {**_described_object(value, path), "space": _space_of(value)}
    if inspect.isclass(value) or inspect.isroutine(value):
        return f"{value.__module__}.{value.__qualname__}"
    described = _described_object(value, path)
    if "config" not in described:
        checks.fail(
            f"`{path.lstrip('.')}` must be a JSON-like value, a class, a function, or an object "
            "with `get_config()`.",
            value=value,
        )
    return described


def _described_object(value: Any, path: str) -> Config:
    """The class of an object and its configuration, where it has one; the name of a function."""
    if inspect.isroutine(value):
        return {"function": f"{value.__module__}.{value.__qualname__}"}
    described: Config = {"class": type(value).__qualname__}
    if callable(getattr(value, "get_config", None)):
        described["config"] = _described(value.get_config(), path)
    elif dataclasses.is_dataclass(value):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        described["config"] = _described(fields, path)
    return described


def _is_hypermodel(value: Any, path: str) -> bool:
    """Whether this builds models from hyperparameters."""
    if inspect.isclass(value) or not callable(getattr(value, "build", value)):
        return False
    if hasattr(value, "declare_hyperparameters"):
        return True
    return callable(value) and (path == ".hypermodel" or _first_parameter(value) == "hp")


def _first_parameter(function: Any) -> str | None:
    try:
        return next(iter(inspect.signature(function).parameters), None)
    except ValueError:  # some that are written in C
        return None


def _space_of(hypermodel: Any) -> Config:
    """The hyperparameters that a hypermodel declares, by name, in all of its conditional scopes."""
    build = getattr(hypermodel, "build", hypermodel)
    known = import_keras_tuner().HyperParameters()
    if hasattr(hypermodel, "declare_hyperparameters"):
        hypermodel.declare_hyperparameters(known)
    waiting: list[Any] = [[]]
    tried: list[Any] = []
    while waiting:
        tried.append(waiting.pop())
        hp = known.copy()
        hp.values.update({condition.name: condition.values[0] for condition in tried[-1]})
        hp.ensure_active_values()
        build(hp)
        known.merge(hp.space)
        waiting += [scope for scope in hp.inactive_scopes if scope not in (*tried, *waiting)]
    space: Config = {}
    for each in known.get_config()["space"]:
        config = {name: value for name, value in each["config"].items() if name != "name"}
        space.setdefault(each["config"]["name"], []).append({each["class_name"]: config})
    return space


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
