"""Hypermodel of the multi-task recommender."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras

from keras_moe.core import checks
from keras_moe.core.types import Activation, Config
from keras_moe.models.features import Feature
from keras_moe.models.multitask_ranker import multitask_ranker
from keras_moe.tuning._choices import Choices, checked
from keras_moe.tuning._keras_tuner import import_keras_tuner
from keras_moe.tuning.mmoe_space import Units, mmoe_space

if TYPE_CHECKING:
    from keras_tuner import HyperParameters

_HyperModel: Any = import_keras_tuner().HyperModel


class HyperMMoERecommender(_HyperModel):
    """Searches a `keras_moe.models.multitask_ranker`: its experts, widths, and training.

    Each argument that is not said to be fixed is a value, which stays out of the search, or a list
    or tuple of values to choose from, the first of them the default.

    Binary tasks train on cross-entropy and report `auc`, regressions on the mean squared error and
    report `rmse`, all with the sample weights, if there are any.

    Args:
        features: Sequence of `keras_moe.models.features` records, fixed.
        tasks: Dict of task names to `"binary"` or `"regression"`, fixed.
        trunk: `"mmoe"` or `"shared_bottom"`. Defaults to `"mmoe"`.
        interactions: Pairs of names of features, fixed, see `multitask_ranker`. Defaults to `()`.
        shared_units: The width of the hidden layer under the trunk, or the widths of several as a
            tuple among the choices. Defaults to `(64, 32, 128)`.
        mmoe: Arguments of `mmoe_space` that narrow it, such as `{"num_experts": 8}`. Defaults to
            `None`.
        tower_units: The width of the hidden layer of each tower, or the widths of several as a
            tuple among the choices. Defaults to `(16, 32)`.
        activation: Activation of all hidden layers. Defaults to `"relu"`.
        dropout: Float in [0, 1), dropout of the embeddings and after each shared layer. Defaults to
            `(0.2, 0.1, 0.3)`.
        embedding_l2: The L2 penalty of embedding tables. Defaults to `(0.0001, 0.00001)`.
        initial_predictions: Dict of tasks to numbers, fixed, see `multitask_ranker`. Defaults to
            `None`.
        loss_weights: Dict of tasks to numbers, fixed, as in `Model.compile`. Defaults to `None`.
        learning_rate: Learning rate of Adam. Defaults to `(0.001, 0.0003, 0.003)`.
        batch_size: The batch size; None leaves it to `tuner.search`. Defaults to `None`.
        jit_compile: Whether to compile by XLA, as in `Model.compile`. Defaults to `"auto"`.
        seed: Integer for weights, dropout and shuffling that are the same in every trial and every
            execution: passed to `keras.utils.set_random_seed` before a model is built. Defaults to
            `None`.
        name: Name of the hypermodel. Defaults to `None`.
        tunable: Whether the hyperparameters join the search, see `keras_tuner.HyperModel`. Defaults
            to `True`.

    Raises:
        ValueError: on no values to choose from, or values out of range.

    Example:

    >>> import keras_tuner
    >>> from keras_moe import tuning
    >>> from keras_moe.models import features
    >>> hypermodel = tuning.HyperMMoERecommender(
    ...     [features.Categorical("user", 1000), features.Categorical("movie", 500)],
    ...     {"watched": "binary", "rating": "regression"},
    ...     mmoe={"num_experts": (4, 8)},
    ... )
    >>> hypermodel.task_losses
    ['val_watched_loss', 'val_rating_loss']
    >>> model = hypermodel.build(keras_tuner.HyperParameters())  # the default
    >>> model.get_layer("mmoe").num_experts
    4

    Reference:
        Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with Multi-gate
        Mixture-of-Experts"; Zhao et al. 2019, "Recommending What Video to Watch Next: A Multitask
        Ranking System".
    """

    def __init__(
        self,
        features: Sequence[Feature],
        tasks: Mapping[str, str],
        *,
        trunk: str | Sequence[str] = "mmoe",
        interactions: Sequence[tuple[str, str]] = (),
        shared_units: int | Sequence[Units] = (64, 32, 128),
        mmoe: Mapping[str, Any] | None = None,
        tower_units: int | Sequence[Units] = (16, 32),
        activation: Activation = "relu",
        dropout: float | Sequence[float] = (0.2, 0.1, 0.3),
        embedding_l2: float | Sequence[float] = (0.0001, 0.00001),
        initial_predictions: Mapping[str, float] | None = None,
        loss_weights: Mapping[str, float] | None = None,
        learning_rate: float | Sequence[float] = (0.001, 0.0003, 0.003),
        batch_size: int | Sequence[int] | None = None,
        jit_compile: bool | str = "auto",
        seed: int | None = None,
        name: str | None = None,
        tunable: bool = True,
    ) -> None:
        super().__init__(name=name, tunable=tunable)
        checked(checks.rate, "dropout", dropout)
        checked(checks.non_negative, "embedding_l2", embedding_l2)
        checked(checks.positive, "learning_rate", learning_rate)
        if batch_size is not None:
            checked(checks.positive_int, "batch_size", batch_size)
        checks.optional(checks.integer, "seed", seed)
        if "dropout" in (mmoe or {}):
            checks.fail(
                "`mmoe` must not set the experts' `dropout`, which the model has not.", mmoe=mmoe
            )
        self._config: Config = {
            "features": list(features),
            "tasks": dict(tasks),
            "trunk": trunk,
            "interactions": list(interactions),
            "shared_units": shared_units,
            "mmoe": dict(mmoe or {}),
            "tower_units": tower_units,
            "activation": activation,
            "dropout": dropout,
            "embedding_l2": embedding_l2,
            "initial_predictions": initial_predictions,
            "loss_weights": loss_weights,
            "learning_rate": learning_rate,
            "batch_size": batch_size,
            "jit_compile": jit_compile,
            "seed": seed,
        }

    @property
    def task_losses(self) -> list[str]:
        """The names of the tasks' validation losses in the logs, which are without penalties."""
        tasks = self._config["tasks"]
        # Keras logs the loss of a single output under no name of its own.
        return [f"val_{task}_loss" for task in tasks] if len(tasks) > 1 else ["val_loss"]

    def build(self, hp: "HyperParameters") -> keras.Model:
        """Returns the compiled model for the values of `hp`.

        Args:
            hp: a `keras_tuner.HyperParameters`.
        """
        config, choices = self._config, Choices(hp)
        searched = ("trunk", "shared_units", "tower_units", "dropout", "embedding_l2")
        arguments = {argument: choices.draw(argument, config[argument]) for argument in searched}
        experts = mmoe_space(hp, "mmoe", **config["mmoe"])
        experts.pop("dropout", None)
        learning_rate = choices.draw("learning_rate", config["learning_rate"])
        choices.draw("batch_size", config["batch_size"])  # known to the search from the start

        if config["seed"] is not None:
            keras.utils.set_random_seed(config["seed"])
        fixed = ("interactions", "activation", "initial_predictions", "seed")
        model = multitask_ranker(
            config["features"],
            config["tasks"],
            **{argument: config[argument] for argument in fixed},
            **arguments,
            **experts,
        )
        tasks = config["tasks"].items()
        model.compile(
            keras.optimizers.Adam(learning_rate),
            loss={task: _loss(kind) for task, kind in tasks},
            loss_weights=config["loss_weights"],
            weighted_metrics={task: [_metric(kind)] for task, kind in tasks},
            jit_compile=config["jit_compile"],
        )
        return model

    def fit(self, hp: "HyperParameters", model: keras.Model, *args: Any, **kwargs: Any) -> Any:
        """Trains the model with what `tuner.search` was given, and the drawn batch size.

        Args:
            hp: a `keras_tuner.HyperParameters`.
            model: what `build` returned.
            *args: arguments of `Model.fit`.
            **kwargs: arguments of `Model.fit`.
        """
        batch_size = Choices(hp).draw("batch_size", self._config["batch_size"])
        if batch_size is not None:
            kwargs["batch_size"] = batch_size
        return model.fit(*args, **kwargs)

    def get_config(self) -> Config:
        """Returns the constructor's arguments, for `check_project`."""
        return dict(self._config)


def _loss(kind: str) -> keras.losses.Loss:
    if kind == "binary":
        return keras.losses.BinaryCrossentropy()
    return keras.losses.MeanSquaredError()


def _metric(kind: str) -> keras.metrics.Metric:
    if kind == "binary":
        return keras.metrics.AUC(name="auc")
    return keras.metrics.RootMeanSquaredError(name="rmse")
