"""A keras-tuner search that can be killed at any moment, and what it found."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import shutil
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import keras
import keras_tuner

from keras_moe.tuning import ActiveCost, check_project

TUNERS = {
    "random": keras_tuner.RandomSearch,
    "hyperband": keras_tuner.Hyperband,
    "bayesian": keras_tuner.BayesianOptimization,
}
OF_THE_TUNER = "tuner/"  # what Hyperband adds to a trial's hyperparameters begins with this
SEED = 1  # of the drawn hyperparameters; KerasTuner takes 0 for no seed
DESCRIPTION, SAVED, RETRAINED = "search.json", "saved.json", "retrained.json"


@dataclass(frozen=True)
class Figure:
    """A measure of a trained model, by its name in the logs."""

    name: str
    title: str
    higher_is_better: bool = True


@dataclass(frozen=True)
class Search:
    """One task to search a model for.

    Args:
        name: Name of its folder.
        title: What it is called in tables and pictures.
        hypermodel: Returns the hypermodel whose weights and shuffling start from a seed.
        objective: The metric, its direction and the cap of the cost.
        metric: The objective's metric, on the validation split.
        fit: Arguments of `Model.fit`: data and its validation split, epochs, batch sizes.
        test: Arguments of `Model.evaluate`: the test split.
        figures: What is measured on the test split.
    """

    name: str
    title: str
    hypermodel: Callable[[int], keras_tuner.HyperModel]
    objective: ActiveCost
    metric: Figure
    fit: dict[str, Any]
    test: dict[str, Any]
    figures: tuple[Figure, ...]


@dataclass(frozen=True)
class Row:
    """One trial, or the default, as the table and the picture show it."""

    number: str
    values: dict[str, Any]
    metric: float
    flops: float
    parameters: float
    seconds: float
    status: str
    message: str = ""

    @property
    def is_complete(self) -> bool:
        return self.status == "complete"


def claim(search: Search, out: Path, tuner: str, overwrite: bool) -> None:
    """Check that the folder is new or holds this very search.

    Raises:
        ValueError: if it holds anything else; nothing is changed then.
    """
    folder = out / search.name
    if overwrite and (folder / DESCRIPTION).exists():
        shutil.rmtree(folder)
    check_project(
        out,
        search.name,
        backend=keras.backend.backend(),
        tuner=tuner,
        objective=search.objective,
        hypermodel=search.hypermodel(0),
        examples=len(keras.tree.flatten(search.fit["x"])[0]),
        epochs=search.fit["epochs"],
        batch_size=search.fit["batch_size"],
    )


def run_trials(
    search: Search, out: Path, kind: str, trials: int, progress: Callable[..., None]
) -> list[Row]:
    """Search until there are as many trials, counting those of earlier runs.

    Args:
        search: What is searched.
        out: The results folder; the trials go to a folder in it named after the search.
        kind: `"random"`, `"hyperband"` or `"bayesian"`.
        trials: The trials in all.
        progress: Called with `trial` and `epoch` (how many are done), and `row` after a trial.

    Returns:
        A row per trial, in the order of their start.
    """
    folder = out / search.name
    restore(folder)
    epochs = search.fit["epochs"]
    arguments = {"max_epochs": epochs} if kind == "hyperband" else {"max_trials": trials}
    with contextlib.redirect_stdout(io.StringIO()):  # "Reloading Tuner from ..."
        tuner = _resumable(TUNERS[kind])(
            search.objective.capped(search.hypermodel(0)),
            objective=search.objective.objective,
            seed=SEED,
            # A failing trial is a result. It must not end the search, however many follow it.
            max_consecutive_failed_trials=trials + 1,
            directory=out,
            project_name=search.name,
            **arguments,
        )
    tuner.oracle.max_trials = trials  # Hyperband's sets none
    tuner.progress = progress
    with warnings.catch_warnings():
        # Deprecated calls of the one, doubts of the other's Gaussian processes.
        warnings.filterwarnings("ignore", module="keras_tuner|sklearn")
        tuner.search(**search.fit, callbacks=[search.objective], verbose=0)
    return tuner.rows()


def restore(folder: Path) -> None:
    """Put the tuner's files back to where they were after the last trial that ended.

    A kill may leave files of KerasTuner half written, or disagreeing with one another. This drops
    what the trial that was killed had begun; the same hyperparameters will be drawn again.
    """
    file = folder / SAVED
    saved = json.loads(file.read_text()) if file.exists() else {}
    for path in _files_of_the_tuner(folder):
        if str(path.relative_to(folder)) not in saved:
            path.unlink()
    for name, text in saved.items():
        if not (folder / name).exists() or (folder / name).read_text() != text:
            (folder / name).write_text(text)


def write_whole(file: Path, value: Any) -> None:
    """Write JSON such that the file is the old one or the new one, whenever it is killed."""
    partial = file.with_suffix(".tmp")
    with partial.open("w") as stream:
        json.dump(value, stream, indent=1)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(partial, file)


def of_the_model(values: dict[str, Any]) -> dict[str, Any]:
    """Return hyperparameters without what the tuner added to them."""
    return {name: value for name, value in values.items() if not name.startswith(OF_THE_TUNER)}


def _files_of_the_tuner(folder: Path) -> list[Path]:
    ours = (DESCRIPTION, SAVED, RETRAINED)
    return [path for path in folder.rglob("*.json") if path.name not in ours]


def _resumable(kind: type[keras_tuner.Tuner]) -> Any:
    """Derive from a tuner one that keeps a copy of its files, and shows its progress."""

    class Resumable(kind):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            self.seconds: dict[str, float] = {}
            self.progress: Callable[..., None] = lambda **_: None
            super().__init__(*args, **kwargs)

        def get_state(self) -> dict[str, Any]:
            return {**super().get_state(), "seconds": self.seconds}

        def set_state(self, state: dict[str, Any]) -> None:
            super().set_state(state)
            self.seconds = state["seconds"]

        def on_trial_begin(self, trial: Any) -> None:
            super().on_trial_begin(trial)
            self._began = time.perf_counter()
            self.progress(trial=len(self.oracle.end_order), epoch=0)

        def on_epoch_end(
            self, trial: Any, model: keras.Model, epoch: int, logs: Any = None
        ) -> None:
            super().on_epoch_end(trial, model, epoch, logs)
            self.progress(trial=len(self.oracle.end_order), epoch=epoch + 1)

        def on_trial_end(self, trial: Any) -> None:
            self.seconds[trial.trial_id] = time.perf_counter() - self._began
            super().on_trial_end(trial)
            folder = Path(self.project_dir)
            files = {
                str(path.relative_to(folder)): path.read_text()
                for path in _files_of_the_tuner(folder)
            }
            write_whole(folder / SAVED, files)  # from here on, the trial is done
            self.progress(trial=len(self.oracle.end_order), epoch=0, row=self._row(trial.trial_id))

        def rows(self) -> list[Row]:
            return [self._row(trial_id) for trial_id in self.oracle.start_order]

        def _row(self, trial_id: str) -> Row:
            trial = self.oracle.trials[trial_id]
            is_complete = trial.status == "COMPLETED"

            def logged(name: str) -> float:
                exists = trial.metrics.exists(name)
                return float(trial.metrics.get_history(name)[-1].mean()) if exists else math.nan

            message = (trial.message or "The metric is not a number.").strip().rpartition("\n")[2]
            is_capped = message.endswith("It is not trained.")
            return Row(
                number=str(self.oracle.start_order.index(trial_id) + 1),
                values=trial.hyperparameters.values,
                metric=math.nan if trial.score is None else trial.score,
                flops=logged("active_flops"),
                parameters=logged("active_parameters"),
                seconds=self.seconds.get(trial_id, math.nan),
                status="complete" if is_complete else "above the cap" if is_capped else "failed",
                # Without the exception's module, which tells a reader nothing.
                message="" if is_complete else message.removeprefix("keras_tuner.src.errors."),
            )

    return Resumable
