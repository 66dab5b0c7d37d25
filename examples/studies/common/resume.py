"""Training that can be killed at any time: what it wrote is whole, and enough to go on exactly."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

History = dict[str, list[float]]


class ResultsError(Exception):
    """The results folder belongs to something else; the message says what to do."""


def open_results(folder: Path, settings: dict[str, Any], overwrite: bool = False) -> None:
    """Make the folder, or check that the runs in it had the same settings.

    Args:
        folder: Where results are, or will be.
        settings: What a run's numbers depend on, as JSON has it.
        overwrite: Whether to start anew where the folder has runs of this script.

    Raises:
        ResultsError: where the folder holds runs with other settings, or other files.
    """
    file = folder / "settings.json"
    if not file.exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ResultsError(
                f"{folder} is no folder of this script (it has no settings.json), and nothing in "
                "it was touched. Choose another one with --out."
            )
    elif not overwrite:
        found = json.loads(file.read_text())
        changed = [
            f"{name} was {found.get(name)!r} and is {settings.get(name)!r}"
            for name in sorted({*found, *settings})
            if found.get(name) != settings.get(name)
        ]
        if changed:
            raise ResultsError(
                f"the runs in {folder} had other settings: {'; '.join(changed)}. Nothing was "
                "changed. Repeat the old settings to go on with them, choose another folder with "
                "--out, or start anew in this one with --overwrite."
            )
    for checkpoint in (folder / "checkpoints").glob("*.npz") if overwrite else ():
        checkpoint.unlink()
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(settings, indent=2).encode())


def write_whole(file: Path, content: bytes) -> None:
    """Write a file so that a reader finds all of it or what was there before."""
    draft = file.with_name(f".{file.name}.draft")
    draft.write_bytes(content)
    os.replace(draft, file)


def state_of(model: keras.Model) -> list[np.ndarray]:
    """Return all that training changes: weights, seed generators, counts, the optimizer."""
    return [ops.convert_to_numpy(variable) for variable in _variables(model)]


def set_state(model: keras.Model, state: list[np.ndarray]) -> None:
    """Give a model the state of another one that was built alike."""
    for variable, value in zip(_variables(model), state, strict=True):
        variable.assign(value)


def _variables(model: keras.Model) -> list[Any]:
    if not model.optimizer.built:
        model.optimizer.build(model.trainable_variables)
    # `Model.variables` has the seed generators' states, which `save_weights` and the callback
    # `BackupAndRestore` leave out: dropout and augmentation would start again from the beginning.
    return [*model.variables, *model.optimizer.variables]


class Checkpoint(keras.callbacks.Callback):
    """Writes the state and the history so far at the end of each epoch, in one piece.

    Args:
        file: Where to, `.npz`.
        history: The epochs before; this callback adds to it.
        seed: Seed of the run.
    """

    def __init__(self, file: Path, history: History, seed: int) -> None:
        super().__init__()
        self.file, self.history, self.seed = file, history, seed

    def on_train_batch_begin(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if batch == 0:
            # Keras's dropout on torch draws from torch's own generator, whose state is no variable.
            # Not at the epoch's begin: opening the data draws too, once per process.
            keras.utils.set_random_seed(1000 * self.seed + len(self.history.get("loss", ())))

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        for name, value in (logs or {}).items():
            self.history.setdefault(name, []).append(float(value))
        draft = self.file.with_name(f".{self.file.name}.draft")
        with open(draft, "wb") as stream:
            np.savez(stream, *state_of(self.model), history=json.dumps(self.history))
        os.replace(draft, self.file)


def load_checkpoint(file: Path, model: keras.Model) -> History:
    """Bring a model to where it was at the end of its last whole epoch; return the history."""
    with np.load(file) as saved:
        set_state(model, [saved[f"arr_{index}"] for index in range(len(saved.files) - 1)])
        return json.loads(str(saved["history"]))
