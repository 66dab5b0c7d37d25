"""Losses and metrics that leave out what has no label."""

import math
from typing import Any

import keras
from keras import ops

from keras_moe.core import checks
from keras_moe.core.types import Config, Tensor


def split_labels(y_true: Any, missing: float) -> tuple[Tensor, Tensor]:
    """Labels, 0 where there is none, and which examples have one, bool `(batch,)`.

    An example lacks its label where any number of it is missing. A label of 0 in its place keeps
    what is computed finite: NaN times a weight of 0 is NaN.
    """
    labels = ops.convert_to_tensor(y_true)
    if not math.isnan(missing):
        is_missing = ops.equal(labels, ops.cast(missing, labels.dtype))
    elif keras.backend.is_float_dtype(keras.backend.standardize_dtype(labels.dtype)):
        is_missing = ops.isnan(labels)
    else:  # integers have no NaN
        is_missing = ops.zeros_like(labels, dtype="bool")
    labels = ops.where(is_missing, ops.zeros_like(labels), labels)
    has_label = ops.logical_not(is_missing)
    if len(has_label.shape) > 1:
        has_label = ops.all(ops.reshape(has_label, (ops.shape(has_label)[0], -1)), axis=-1)
    return labels, has_label


@keras.saving.register_keras_serializable(package="keras_moe")
class MaskedLoss(keras.losses.Loss):
    """Wraps a loss: the mean over the examples that have a label.

    Examples without one give the task no gradient, and other tasks all of theirs. Keras would make
    NaN of a label that is NaN, also where its weight is 0, and would divide by the whole batch. A
    batch without any label costs 0.

    Args:
        loss: A name or a `keras.losses.Loss` with a value per example; its own reduction is not
            used.
        missing: Number that stands for no label, such as -1. Defaults to NaN.
        name: Name of the loss. Defaults to `None`, the wrapped one's.

    Raises:
        ValueError: On what is no loss of Keras's.

    Example:

    >>> import keras_moe, numpy as np
    >>> loss = keras_moe.multitask.MaskedLoss("mse")
    >>> float(loss(np.array([[1.0], [np.nan], [0.0]]), np.array([[0.0], [5.0], [0.0]])))
    0.5
    """

    def __init__(
        self,
        loss: str | keras.losses.Loss | Config,
        missing: float = math.nan,
        name: str | None = None,
    ) -> None:
        made = keras.losses.get(loss)
        if not callable(made):
            checks.fail("`loss` must be the name of a Keras loss, or a `Loss`.", loss=loss)
        named = made.name if isinstance(made, keras.losses.Loss) else made.__name__
        super().__init__(name=name or named)
        self.loss, self.missing = made, float(missing)

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Tensor:
        values, has_label = self._values(y_true, y_pred)
        if sample_weight is not None:
            given = ops.cast(ops.convert_to_tensor(sample_weight), values.dtype)
            values = values * ops.reshape(given, ops.shape(values))
        count = ops.sum(ops.cast(has_label, values.dtype))
        return ops.sum(values) / ops.maximum(count, 1.0)

    def call(self, y_true: Any, y_pred: Any) -> Tensor:
        """The values per example, `(batch,)`, 0 without a label."""
        return self._values(y_true, y_pred)[0]

    def _values(self, y_true: Any, y_pred: Any) -> tuple[Tensor, Tensor]:
        labels, has_label = split_labels(y_true, self.missing)
        predictions = ops.convert_to_tensor(y_pred)
        if len(labels.shape) == len(predictions.shape) - 1 and predictions.shape[-1] == 1:
            labels = ops.expand_dims(labels, -1)
        is_loss = isinstance(self.loss, keras.losses.Loss)
        values = (self.loss.call if is_loss else self.loss)(labels, predictions)
        values = ops.cast(values, keras.config.floatx())
        if len(values.shape) > 1:
            values = ops.mean(values, axis=tuple(range(1, len(values.shape))))
        # Not a product: what a loss makes of such an example may be infinite.
        return ops.where(has_label, values, ops.zeros_like(values)), has_label

    def get_config(self) -> Config:
        missing = None if math.isnan(self.missing) else self.missing
        return {"loss": keras.losses.serialize(self.loss), "missing": missing, "name": self.name}

    @classmethod
    def from_config(cls, config: Config) -> "MaskedLoss":
        missing = config["missing"]
        return cls(**{**config, "missing": math.nan if missing is None else missing})


@keras.saving.register_keras_serializable(package="keras_moe")
class MaskedMetric(keras.metrics.Metric):
    """Wraps a metric, which sees only the examples that have a label.

    Args:
        metric: A name or a `keras.metrics.Metric` that takes sample weights.
        missing: Number that stands for no label. Defaults to NaN.
        name: Name of the metric. Defaults to `None`, the wrapped one's.

    Example:

    >>> import keras_moe, numpy as np
    >>> metric = keras_moe.multitask.MaskedMetric("mae")
    >>> metric.update_state(np.array([[1.0], [np.nan]]), np.array([[0.5], [9.0]]))
    >>> float(metric.result())
    0.5
    """

    def __init__(
        self,
        metric: str | keras.metrics.Metric | Config,
        missing: float = math.nan,
        name: str | None = None,
        **kwargs: Any,
    ) -> None:
        made = keras.metrics.get(metric)
        if not isinstance(made, keras.metrics.Metric):
            checks.fail(
                "`metric` must be the name of a Keras metric, or a `Metric`.", metric=metric
            )
        super().__init__(name=name or made.name, **kwargs)
        self.metric, self.missing = made, float(missing)

    def update_state(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> None:
        labels, has_label = split_labels(y_true, self.missing)
        weights = ops.cast(has_label, "float32")
        if sample_weight is not None:
            given = ops.cast(ops.convert_to_tensor(sample_weight), "float32")
            weights = weights * ops.reshape(given, ops.shape(weights))
        self.metric.update_state(labels, y_pred, sample_weight=weights)

    def result(self) -> Any:
        return self.metric.result()

    def reset_state(self) -> None:
        self.metric.reset_state()

    def get_config(self) -> Config:
        missing = None if math.isnan(self.missing) else self.missing
        config: Config = super().get_config()
        return {**config, "metric": keras.metrics.serialize(self.metric), "missing": missing}

    @classmethod
    def from_config(cls, config: Config) -> "MaskedMetric":
        missing = config["missing"]
        return cls(**{**config, "missing": math.nan if missing is None else missing})
