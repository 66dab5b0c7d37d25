"""Health of the experts in the progress bar, the history and files, and as alarms."""

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import keras
import numpy as np

from keras_moe.callbacks.writers import (
    CsvWriter,
    JsonWriter,
    TensorBoardWriter,
    Writer,
    needed_of_tensorboard,
)
from keras_moe.core import checks
from keras_moe.core.types import Config, Logs
from keras_moe.inspection.alarms import Alarm, ExpertAlarm, alarms
from keras_moe.inspection.health import BY_DEFAULT, NAMES, Counts, difference, have_dropped
from keras_moe.inspection.layer_numbers import has_losses, layer_numbers
from keras_moe.inspection.mixtures import is_of_keras_3, named_layers, sync_state
from keras_moe.inspection.recording import counting_apart, evaluating_anew

# What the progress bar shows, of the worst layer; of names in one pair, the larger number.
_IN_BAR = (("load_cv", "importance_cv"), ("dropped",))


@keras.saving.register_keras_serializable(package="keras_moe")
class ExpertMonitor(keras.callbacks.Callback):
    """Shows the health of each mixture layer in `fit`, and warns where experts are dead.

    For each layer that counts (`MoE`, `SwitchFFN`, `SoftMoE`, `MMoE`, at any depth of the model),
    over the epoch so far, padding excluded. By default in `history`:

    - `{layer}/load_cv`: standard deviation of the experts' load, assignments before drops, over its
      mean. 0 is perfect balance, sqrt(E - 1) one expert taking everything. Where all experts take
      part, `{layer}/importance_cv`, the same of their importance: of the combine weights of
      `SoftMoE`, of the gate weights of `MMoE` (the mean over tasks).
    - `{layer}/dropped`: share of assignments dropped for lack of capacity; only for layers that
      have a capacity.
    - `{layer}/entropy`: mean entropy of the router in nats, between 0 and log(E); for `SoftMoE`
      of a token's combine weights per expert, for `MMoE` the mean over tasks.

    - `aux_loss`: what the router losses of all layers, times their coefficients, add to `loss`, the
      mean over batches, where layers have such losses. `loss - aux_loss` is the task's own. Beside
      `val_loss` there is `val_aux_loss`. The bar of `evaluate(callbacks=[monitor])` shows it too,
      and `monitor.evaluated_aux_loss` is that of the last evaluation, which Keras does not return.

    The progress bar shows the first two of the layer where they are worst, which is named, and
    `aux_loss`. A layer may take another's place from epoch to epoch, so name in `metrics` what
    another callback is to read, such as `EarlyStopping`: then the bar and the logs of each epoch
    have it for every layer.

    On request, in `metrics`, and always in files:

    - `max_violation`: largest load over the mean, minus 1.
    - `used_experts`: exp(entropy of the experts' shares of the load), E at perfect balance.
    - `dead_experts`: how many experts get less than 1 % of their share.
    - `effective_experts`: exp(`entropy`), between how many experts the router wavers.
    - `confidence`: mean of the router's largest probability, for sparse layers.
    - `least_share`: what the expert with the least gets, over its fair share.
    - `batch_cv`: the `load_cv` within a batch, mean over batches; `worst_batch_cv` and
      `worst_dropped` of the worst batch. Where the experts in favour change from batch to batch,
      the numbers over an epoch do not show it.
    - `aux_loss`: the part of this layer.
    - `combine_min`, `combine_max`: of `SoftMoE`, the combine weight of the least and the most used
      slot over all tokens, over the mean slot's.
    - `dispatch_min`, `dispatch_max`: of `SoftMoE`, the weight in all slots of the token that enters
      them least and most, over the mean token's; the mean over the sequences.
    - `slot_cosine`: of `SoftMoE`, the mean absolute cosine of two slots' vectors `phi`.
    - `task_entropy`, `task_gates`: of `MMoE`, a number `{layer}/{task}/entropy` per task, and
      `{layer}/{task}/expert_{e}` per gate weight, the mean over tokens or examples.

    At the end of an epoch a warning of category `ExpertAlarm` says what is wrong and what to try,
    once per layer and kind in a `fit`: dead or starved experts, a collapse to few of them, an
    imbalance within batches, a saturated router, many drops, uniform slots, gates that take one
    expert alone. At the start of a `fit` another one says where the optimizer accumulates gradients
    and a router that adapts to the load does not wait for it.

    Args:
        every: Positive integer, the batches between two reads of the counts, which are also read
            at the end of an epoch. Reading waits for the device, and on JAX copies the state of the
            whole model. Defaults to `10`.
        metrics: Names of what is shown of each layer; or `"all"`, to have all in the history and
            the same bar. Defaults to `None`, for the first three in the history.
        alarms: Whether to warn. Defaults to `True`.
        csv: Optional path of a file with a line per epoch and a column per number. A `fit` whose
            `initial_epoch` is above 0 keeps the lines of the epochs before; another one starts the
            file anew. What cannot be written is warned of, and training goes on. Defaults to
            `None`.
        json: Optional path of a file with a JSON object per line and epoch, which holds all that
            was counted, per expert, too. Defaults to `None`.
        log_dir: Optional folder for an event file of TensorBoard, which is written without
            TensorFlow. Defaults to `None`.

    Raises:
        ValueError: on an unknown metric.
        ImportError: with a `log_dir` and no tensorboard.

    Example:

    >>> import keras, keras_moe, numpy as np
    >>> model = keras.Sequential([keras_moe.layers.MoE(4, 8, name="moe"), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    >>> history = model.fit(
    ...     x, x[:, :1], verbose=0, callbacks=[keras_moe.callbacks.ExpertMonitor()]
    ... )
    >>> sorted(history.history)
    ['aux_loss', 'loss', 'moe/entropy', 'moe/load_cv']

    Reference:
        Wang et al. 2024, "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
        equation 4 (max violation). Puigcerver et al. 2023, "From Sparse to Soft Mixtures of
        Experts", figure 24 (contributions of tokens and slots) and appendix I (cosines of slots).
    """

    def __init__(
        self,
        every: int = 10,
        *,
        metrics: str | Sequence[str] | None = None,
        alarms: bool = True,
        csv: str | Path | None = None,
        json: str | Path | None = None,
        log_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        self.every = checks.positive_int("every", every)
        self.metrics = _metric_names(metrics)
        self._metrics = metrics
        self._names_are_given = metrics is not None and metrics != "all"
        self.alarms = bool(alarms)
        self.csv, self.json, self.log_dir = csv, json, log_dir
        if log_dir is not None:
            needed_of_tensorboard()("tensorboard.compat.proto.event_pb2")
        self.evaluated_aux_loss: float | None = None
        self.found_alarms: list[tuple[str, Alarm]] = []
        self._before: dict[int, Counts] = {}
        self._latest: dict[str, float] = {}
        self._shown: list[str] = []
        self._rows: list[dict[str, float]] = []
        self._raised: set[tuple[str, str]] = set()
        self._batches, self._is_first, self._written = 0, True, -1
        self._writers: list[Writer] = []
        self._trains = self._is_compiled = False
        self._programs = ExitStack()  # of evaluation, in a `fit` or outside
        self._evaluation = ExitStack()
        self._read_evaluation: Callable[[], dict[str, Counts]] | None = None

    def on_train_begin(self, logs: Logs | None = None) -> None:
        self._end_evaluation()  # of one that failed
        if self._is_first and self._trains:
            _warn("The same monitor is given twice. Training goes on with one.")
        self._trains = True
        self._raised, self._rows = set(), []
        self._before, self._batches, self._is_first, self._written = {}, 0, True, -1
        self._check_accumulation()

    def _open_writers(self, first: int) -> None:
        """Opens the files, which a training that goes on adds to."""
        paths = ((self.csv, CsvWriter), (self.json, JsonWriter), (self.log_dir, TensorBoardWriter))
        self._writers = []
        for path, make in paths:
            if path is None:
                continue
            try:
                self._writers.append(make(Path(path), first))
            except (OSError, ValueError, KeyError) as error:
                _warn_of(path, error)

    def _check_accumulation(self) -> None:
        """Warns of routers that change at other steps than the optimizer does."""
        optimizer = getattr(self.model, "optimizer", None)
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)  # of one that scales the loss
        steps = getattr(optimizer, "gradient_accumulation_steps", None) or 1
        for name, layer in named_layers(self.model):
            router = getattr(layer, "router", None)
            every = getattr(router, "update_every", steps)
            if every != steps:
                _warn(
                    f"{name}: the router changes what follows the load every {every} batches, the "
                    f"optimizer its weights every {steps}. Give `{type(router).__name__}` "
                    f"`update_every={steps}`."
                )

    def on_epoch_begin(self, epoch: int, logs: Logs | None = None) -> None:
        if self._is_first:
            self._open_writers(epoch)
            self._is_first = False
        for _, layer in named_layers(self.model):
            getattr(layer, "reset_worst_batch", lambda: None)()
        self._before = {id(layer): counts for _, layer, counts in self._read()}
        self._latest, self._shown, self._batches = {}, [], 0

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        # Keras calls once for several batches where `steps_per_execution` is above 1.
        looked, self._batches = self._batches // self.every, batch + 1
        if self._batches // self.every > looked:
            self._latest = self._logs(self._new())
        if logs is not None:
            logs.update(self._latest)

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        new = self._new()
        self._latest = self._logs(new)
        if self._is_compiled and self.evaluated_aux_loss is not None:
            self._latest["val_aux_loss"] = self.evaluated_aux_loss  # Keras copied the logs since
        if logs is not None:
            logs.update(self._latest)
        if self._written != epoch:  # a monitor that is given twice writes once
            self._written = epoch
            self._rows.append(self._scalars(new, self.metrics))
            self._write(epoch, new)
        self.found_alarms = [
            (name, alarm) for name, layer, counts in new for alarm in alarms(layer, counts)
        ]
        if self.alarms:
            self._warn(epoch)

    def _write(self, epoch: int, new: Sequence[tuple[str, keras.layers.Layer, Counts]]) -> None:
        if self._writers:
            details = {
                name: {key: np.asarray(value).tolist() for key, value in counts.items()}
                for name, _, counts in new
            }
            for writer in list(self._writers):
                try:
                    writer.write(epoch, self._scalars(new, NAMES), details)
                except OSError as error:
                    self._writers.remove(writer)
                    _warn_of(type(writer).__name__, error)

    def on_test_begin(self, logs: Logs | None = None) -> None:
        self._evaluation.close()  # of one that failed
        if not is_of_keras_3(self.model):
            return
        sync_state(self.model)
        named = [
            (name, layer)
            for name, layer in named_layers(self.model)
            if has_losses(layer) and not layer.counts_always  # by another monitor
        ]
        if not named:
            return
        if not self._is_compiled:
            self._programs.enter_context(evaluating_anew(self.model))
            self._is_compiled = True
        self._read_evaluation = self._evaluation.enter_context(counting_apart(named))

    def on_test_end(self, logs: Logs | None = None) -> None:
        if self._read_evaluation is not None:
            sync_state(self.model)
            layers = dict(named_layers(self.model))
            new = [(name, layers[name], counts) for name, counts in self._read_evaluation().items()]
            self.evaluated_aux_loss = sum(self._scalars(new, ["aux_loss"]).values())
            if logs is not None:
                logs["aux_loss"] = self.evaluated_aux_loss
        self._evaluation.close()
        self._read_evaluation = None
        if not self._trains:
            self._end_evaluation()

    def _end_evaluation(self) -> None:
        """Gives the model back its counts and its program of evaluation."""
        self._evaluation.close()
        self._programs.close()
        self._is_compiled, self._read_evaluation = False, None

    def on_train_end(self, logs: Logs | None = None) -> None:
        self._trains = False
        self._complete_history()
        self._end_evaluation()
        for writer in self._writers:
            writer.close()
        self._writers = []

    def _complete_history(self) -> None:
        """Adds to the history what the bar did not show; Keras makes it after the first epoch."""
        history = getattr(getattr(self.model, "history", None), "history", {})
        if not self._rows or len(history.get("loss", ())) != len(self._rows):
            return
        for name in dict.fromkeys(name for row in self._rows for name in row):
            history[name] = [row.get(name, float("nan")) for row in self._rows]

    # What the `fit` of Keras 2 asks of a callback: there it watches what is in a `KerasBridge`.

    def _implements_train_batch_hooks(self) -> bool:
        return True

    def _implements_test_batch_hooks(self) -> bool:
        return False

    def _implements_predict_batch_hooks(self) -> bool:
        return False

    def _warn(self, epoch: int) -> None:
        for name, (kind, message) in self.found_alarms:
            if (name, kind) not in self._raised:
                self._raised.add((name, kind))
                _warn(f"{name}, epoch {epoch + 1}: {message}")

    def _new(self) -> list[tuple[str, keras.layers.Layer, Counts]]:
        """By layer, what was counted in this epoch."""
        before = self._before  # lacks the layers that TensorFlow's first step builds
        read = self._read()
        for _, layer, now in read:
            if id(layer) in before and have_dropped(now, before[id(layer)]):
                del before[id(layer)]  # weights were restored, or counts reset: they start anew
        return [
            (name, layer, difference(now, before[id(layer)]) if id(layer) in before else now)
            for name, layer, now in read
        ]

    def _logs(self, new: Sequence[tuple[str, keras.layers.Layer, Counts]]) -> dict[str, float]:
        """What is shown, and the losses of all layers in one sum."""
        losing = [each for each in new if has_losses(each[1])]
        losses = self._scalars(losing, ["aux_loss"]).values()
        total = {"aux_loss": sum(losses)} if losing else {}
        if self._names_are_given:
            return self._scalars(new, self.metrics) | total
        scalars = self._scalars(new, [name for names in _IN_BAR for name in names])
        if not self._shown:
            self._shown = _worst(scalars)
        return {name: scalars[name] for name in self._shown if name in scalars} | total

    @staticmethod
    def _scalars(
        new: Sequence[tuple[str, keras.layers.Layer, Counts]], wanted: Sequence[str]
    ) -> dict[str, float]:
        return {
            f"{name}/{key}": value
            for name, layer, counts in new
            for key, value in layer_numbers(layer, counts, wanted).items()
        }

    def _read(self) -> list[tuple[str, keras.layers.Layer, Counts]]:
        sync_state(self.model)
        return [
            (name, layer, layer.running_counts())
            for name, layer in named_layers(self.model)
            if layer.counts_in_training
        ]

    def get_config(self) -> Config:
        paths = {"csv": self.csv, "json": self.json, "log_dir": self.log_dir}
        return {
            "every": self.every,
            "metrics": list(self.metrics) if self._names_are_given else self._metrics,
            "alarms": self.alarms,
            **{name: None if path is None else str(path) for name, path in paths.items()},
        }


def _worst(scalars: dict[str, float]) -> list[str]:
    """The names of the largest number of each kind, which name its layer."""
    kinds = (
        [name for name in scalars if name.endswith(tuple(f"/{kind}" for kind in kinds))]
        for kinds in _IN_BAR
    )
    return [max(names, key=scalars.__getitem__) for names in kinds if names]


def _warn(message: str) -> None:
    """Warns without a line of source, which would be one of this file or of Keras."""
    warnings.warn_explicit(message, ExpertAlarm, "ExpertMonitor", 0)


def _warn_of(file: object, error: Exception) -> None:
    """Warns of a file that is not written; training goes on without it."""
    _warn(f"`{file}` is not written: {type(error).__name__}: {error}. Training goes on.")


def _metric_names(metrics: str | Sequence[str] | None) -> tuple[str, ...]:
    if metrics is None or metrics == "all":
        return BY_DEFAULT if metrics is None else NAMES
    names = (metrics,) if isinstance(metrics, str) else tuple(metrics)
    return tuple(checks.one_of("metrics", name, NAMES) for name in names)
