"""A hypermodel whose models above a cap are recorded and not trained."""

import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import keras

from keras_moe.core.types import Config
from keras_moe.tuning._keras_tuner import import_keras_tuner

if TYPE_CHECKING:
    from keras_tuner import HyperParameters

_HyperModel: Any = import_keras_tuner().HyperModel
_FailedTrialError: Any = import_keras_tuner().errors.FailedTrialError


class OverCapError(_FailedTrialError):
    """A model above a cap.

    Args:
        message: what was counted, and the cap.
        metrics: what the trial is recorded with.
    """

    def __init__(self, message: str, metrics: Mapping[str, float]) -> None:
        super().__init__(message)
        self.metrics = dict(metrics)


class CappedHyperModel(_HyperModel):
    """Another hypermodel, which returns what a model above a cap costs in place of training it.

    Args:
        hypermodel: a `keras_tuner.HyperModel`, or a function from hyperparameters to a model.
    """

    def __init__(self, hypermodel: Any) -> None:
        is_function = not isinstance(hypermodel, _HyperModel)
        super().__init__(
            name=None if is_function else hypermodel.name,
            tunable=is_function or hypermodel.tunable,
        )
        self.hypermodel = hypermodel
        self._build_model: Callable[..., keras.Model] = (
            hypermodel if is_function else hypermodel.build
        )
        self._fit_model: Callable[..., Any] = super().fit if is_function else hypermodel.fit

    def build(self, hp: "HyperParameters") -> keras.Model:
        """Returns the other's model.

        Args:
            hp: a `keras_tuner.HyperParameters`.
        """
        return self._build_model(hp)

    def declare_hyperparameters(self, hp: "HyperParameters") -> None:
        """Declares what the other declares before it builds.

        Args:
            hp: a `keras_tuner.HyperParameters`.
        """
        if isinstance(self.hypermodel, _HyperModel):
            self.hypermodel.declare_hyperparameters(hp)

    def fit(self, hp: "HyperParameters", model: keras.Model, *args: Any, **kwargs: Any) -> Any:
        """Trains the model as the other does, or says what it costs where that is too much.

        Args:
            hp: a `keras_tuner.HyperParameters`.
            model: what `build` returned.
            *args: arguments of `Model.fit`.
            **kwargs: arguments of `Model.fit`.
        """
        try:
            return self._fit_model(hp, model, *args, **kwargs)
        except OverCapError as error:
            for callback in kwargs["callbacks"]:
                if hasattr(callback, "trial"):  # KerasTuner adds one that knows the trial
                    callback.trial.message = str(error)
            # It takes the minimum of a score that is NaN.
            warnings.filterwarnings("ignore", "All-NaN", RuntimeWarning, "keras_tuner")
            return error.metrics

    def get_config(self) -> Config:
        """Returns the other hypermodel, for `check_project`."""
        return {"hypermodel": self.hypermodel}
