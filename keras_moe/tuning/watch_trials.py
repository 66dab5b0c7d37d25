"""Monitors of a tuner's trials, which end where experts are in trouble."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

from keras_moe.callbacks import ExpertMonitor
from keras_moe.core import checks
from keras_moe.core.types import Logs
from keras_moe.inspection.alarms import KINDS

_GRAVE = ("dead", "collapse", "few")


def watch_trials(
    tuner: Any,
    folder: str | Path,
    *,
    prune: Collection[str] = _GRAVE,
    patience: int = 2,
) -> None:
    """Gives each trial of a tuner an `ExpertMonitor`, and ends trials whose routing collapses.

    The files of a trial are `{folder}/trial_{trial_id}/experts_{execution}.csv` and `.jsonl`, with
    executions from 0. A trial that is ended keeps the score that it has reached, and its `message`
    begins with "Pruned: ".

    Args:
        tuner: A tuner of keras-tuner that trains Keras models, before its `search`.
        folder: Where the files go.
        prune: Kinds of alarms that end a trial. None are pruned where it is empty. Defaults to
            `("dead", "collapse", "few")`.
        patience: Positive integer, the epochs in a row with such an alarm that end a trial.
            Defaults to `2`.

    Raises:
        ValueError: on an unknown kind.

    Example:

    >>> import keras_moe
    >>> class Tuner:  # one of keras-tuner's has more
    ...     def run_trial(self, trial, *args, **kwargs):
    ...         return kwargs["callbacks"]
    >>> tuner = Tuner()
    >>> keras_moe.tuning.watch_trials(tuner, "experts")
    """
    kinds = tuple(checks.one_of("prune", kind, KINDS) for kind in prune)
    checks.positive_int("patience", patience)
    run = tuner.run_trial

    def run_trial(trial: Any, *args: Any, **kwargs: Any) -> Any:
        monitor = _TrialMonitor(Path(folder) / f"trial_{trial.trial_id}", kinds, patience)
        kwargs["callbacks"] = [*(kwargs.get("callbacks") or []), monitor]
        results = run(trial, *args, **kwargs)
        if monitor.pruned is not None:
            trial.message = monitor.pruned
        return results

    tuner.run_trial = run_trial


class _TrialMonitor(ExpertMonitor):
    """Writes files of a trial, one pair for each of its executions, and may end them."""

    def __init__(self, folder: Path, kinds: Collection[str], patience: int) -> None:
        super().__init__(alarms=False)
        self.folder, self.kinds, self.patience = folder, kinds, patience
        self.execution, self.bad_epochs = -1, 0
        self.pruned: str | None = None

    def __deepcopy__(self, memo: Any) -> "_TrialMonitor":
        return self  # keras-tuner copies callbacks for each execution, which this one counts

    def on_train_begin(self, logs: Logs | None = None) -> None:
        self.execution, self.bad_epochs = self.execution + 1, 0
        self.csv = self.folder / f"experts_{self.execution}.csv"
        self.json = self.folder / f"experts_{self.execution}.jsonl"
        super().on_train_begin(logs)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        super().on_epoch_end(epoch, logs)
        found = [each for each in self.found_alarms if each[1].kind in self.kinds]
        self.bad_epochs = self.bad_epochs + 1 if found else 0
        if self.bad_epochs >= self.patience:
            name, alarm = found[0]
            self.pruned = f"Pruned: {alarm.kind} in {name}, epoch {epoch + 1}: {alarm.message}"
            self.model.stop_training = True
