"""An objective that takes the cost of a model into account."""

import math
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import keras
import numpy as np

from keras_moe.core import checks
from keras_moe.core.types import Config, Logs
from keras_moe.flops.active_flops import Shapes, active_flops
from keras_moe.flops.active_parameters import active_parameters
from keras_moe.tuning._keras_tuner import import_keras_tuner

_DIRECTIONS = ("max", "min")


@keras.saving.register_keras_serializable(package="keras_moe")
class ActiveCost(keras.callbacks.Callback):
    """Scores a trial by a metric and by the FLOPs and parameters that an example makes active.

    score = mean(metrics) * (flops / target_flops)^-w * (parameters / target_parameters)^-w
    with the exponents +w where `direction` is "min". A callback for `tuner.search`, of any tuner
    and any hypermodel; its `objective` is the tuner's. Every epoch's logs, and so every trial's
    metrics, get `active_flops`, `active_parameters`, and the score under the objective's name.

    A model above a cap fails its trial before it trains, with the number and the cap in the trial's
    message; on TensorFlow a model that is not built yet trains for one batch first. Give the tuner
    `cost.capped(hypermodel)`: it records the cost of such a trial too. Without it, KerasTuner
    records nothing and prints a traceback. It ends a search after 3 failed trials in a row, unless
    its `max_consecutive_failed_trials` says otherwise.

    Args:
        metric: Name in the logs, such as `"val_accuracy"`, or a sequence of names, whose mean
            counts; numbers of at least 0.
        direction: `"max"` or `"min"`, which way the metric is better.
        max_flops: Positive number, the active FLOPs per example, forward, above which a trial
            fails; None for no cap. Defaults to `None`.
        max_parameters: Positive number, the active parameters above which a trial fails; None for
            no cap. Defaults to `None`.
        target_flops: Positive number, the active FLOPs that leave the metric as it is; None for no
            penalty of FLOPs. Defaults to `None`.
        target_parameters: Positive number, the same for active parameters. Defaults to `None`.
        input_shape: The shape of one example, see `active_flops`; for models whose inputs have
            unknown axes or are not known, as those of subclassed models. Defaults to `None`.
        exponent: Number w of at least 0, or a pair of them, at or below the target and above it.
            `0.07` is MnasNet's soft constraint: twice the cost for 5 % more of the metric.
            `(0.0, 1.0)` is its hard one. Defaults to `0.07`.

    Raises:
        ValueError: on arguments out of range.
        ImportError: from `objective`, `capped` and a cap, where keras-tuner is missing.

    Example:

    >>> from keras_moe import tuning
    >>> cost = tuning.ActiveCost("val_accuracy", "max", max_flops=2e6, target_flops=1e6)
    >>> cost.objective.name, cost.objective.direction
    ('val_accuracy_at_cost', 'max')
    >>> round(cost.score(0.9, flops=2_000_000, parameters=50_000), 4)
    0.8574

    Reference:
        Tan et al. 2019, "MnasNet: Platform-Aware Neural Architecture Search for Mobile", section
        3.1, equation 2.
    """

    def __init__(
        self,
        metric: str | Sequence[str],
        direction: str,
        *,
        max_flops: float | None = None,
        max_parameters: float | None = None,
        target_flops: float | None = None,
        target_parameters: float | None = None,
        input_shape: Shapes | None = None,
        exponent: float | Sequence[float] = 0.07,
    ) -> None:
        super().__init__()
        metrics = [metric] if isinstance(metric, str) else list(metric)
        if not metrics or not all(isinstance(name, str) and name for name in metrics):
            checks.fail("`metric` must be a name in the logs or a list of them.", metric=metric)
        self.metrics = metrics
        self.direction = checks.one_of("direction", direction, _DIRECTIONS)
        self.max_flops = checks.optional(checks.positive, "max_flops", max_flops)
        self.max_parameters = checks.optional(checks.positive, "max_parameters", max_parameters)
        self.target_flops = checks.optional(checks.positive, "target_flops", target_flops)
        self.target_parameters = checks.optional(
            checks.positive, "target_parameters", target_parameters
        )
        self.input_shape = input_shape
        pair = [exponent, exponent] if isinstance(exponent, int | float) else list(exponent)
        if len(pair) != 2:
            checks.fail("`exponent` must be a number or a pair of numbers.", exponent=exponent)
        self.exponent = tuple(checks.non_negative("exponent", exponent) for exponent in pair)
        self._flops, self._parameters, self._is_known = 0, 0, False

    @property
    def name(self) -> str:
        """The name of the score in the logs."""
        name = self.metrics[0] if len(self.metrics) == 1 else f"mean({', '.join(self.metrics)})"
        has_target = self.target_flops is not None or self.target_parameters is not None
        return f"{name}_at_cost" if has_target else name

    @property
    def objective(self) -> Any:
        """The `keras_tuner.Objective` of the score."""
        return import_keras_tuner().Objective(self.name, self.direction)

    def capped(self, hypermodel: Any) -> Any:
        """Returns a hypermodel for the tuner whose models above a cap are recorded, not trained.

        Such a trial has its cost, a score of NaN, and one line as its message; KerasTuner takes it
        for failed, after as many tries as its `max_retries_per_trial` allows.

        Args:
            hypermodel: a `keras_tuner.HyperModel`, or a function from hyperparameters to a model.
        """
        return _capped_module().CappedHyperModel(hypermodel)

    def score(self, metric: float, flops: float, parameters: float) -> float:
        """Returns the metric, worse for what the model costs above the target.

        Args:
            metric: value of the metric, at least 0.
            flops: active FLOPs per example.
            parameters: active parameters.
        """
        if metric < 0:
            checks.fail(
                "`metric` must be at least 0 to be multiplied by a penalty.",
                **{", ".join(self.metrics): metric},
            )
        factor = 1.0
        for cost, target in ((flops, self.target_flops), (parameters, self.target_parameters)):
            if target is not None:
                ratio = cost / target
                factor *= ratio ** self.exponent[int(ratio > 1)]
        return metric / factor if self.direction == "max" else metric * factor

    def on_train_begin(self, logs: Logs | None = None) -> None:
        self._is_known = bool(self.model.built)
        if self._is_known:
            self._count()

    def on_train_batch_end(self, batch: int, logs: Logs | None = None) -> None:
        if not self._is_known:  # Keras on TensorFlow builds a model in its first step
            self._is_known = True
            self._count()

    def _count(self) -> None:
        self._flops = active_flops(self.model, self.input_shape)
        self._parameters = active_parameters(self.model)
        over = [
            f"{cost:,} active {what}, above {name}={cap:,.0f}"
            for what, cost, name, cap in (
                ("FLOPs per example", self._flops, "max_flops", self.max_flops),
                ("parameters", self._parameters, "max_parameters", self.max_parameters),
            )
            if cap is not None and cost > cap
        ]
        if over:
            message = f"The model has {' and '.join(over)}. It is not trained."
            unknown = dict.fromkeys((*self.metrics, self.name), math.nan)
            raise _capped_module().OverCapError(message, unknown | self._costs())

    def on_epoch_end(self, epoch: int, logs: Logs | None = None) -> None:
        logs = {} if logs is None else logs
        missing = [name for name in self.metrics if name not in logs]
        if missing:
            # Fatal, because it would be missing in every trial.
            raise import_keras_tuner().errors.FatalValueError(
                f"`metric` must be among {sorted(logs)}, the logs of `fit`; names that start with "
                f"'val_' need validation data. Received: metric={missing}"
            )
        mean = float(np.mean([float(logs[name]) for name in self.metrics]))
        logs.update(self._costs())
        if self.name not in self.metrics:
            logs[self.name] = self.score(mean, self._flops, self._parameters)

    def _costs(self) -> dict[str, float]:
        return {"active_flops": self._flops, "active_parameters": self._parameters}

    def get_config(self) -> Config:
        return {
            "metric": list(self.metrics),
            "direction": self.direction,
            "max_flops": self.max_flops,
            "max_parameters": self.max_parameters,
            "target_flops": self.target_flops,
            "target_parameters": self.target_parameters,
            "input_shape": self.input_shape,
            "exponent": list(self.exponent),
        }


def _capped_module() -> Any:
    """The module that needs keras-tuner."""
    return import_module("keras_moe.tuning._capped")
