"""A model of the gate weights of another model."""

import inspect
from typing import Any, Self

import keras

from keras_moe.core import checks
from keras_moe.core.types import Config, Tensor
from keras_moe.inspection.mixtures import named_layers, one_layer
from keras_moe.inspection.recording import listening
from keras_moe.layers import MMoE


def task_gates(model: keras.layers.Layer, layer: str | None = None) -> keras.Model:
    """Returns a model from the inputs of a model with an `MMoE` to the weights of its gates.

    It shares the model's weights, so it can be made before training, and follows it. It calls the
    whole model, and saves it: loaded from a file, it is on its own.

    Args:
        model: A built model of any kind with an `MMoE`, such as `multitask_ranker` returns, also
            after loading it from a file. The `MMoE` may be at any depth, but not in a loop that the
            backend compiles on its own, such as an RNN's.
        layer: Name of the `MMoE`, "tasks#2" for a second "tasks"; None where there is one only.
            Defaults to `None`.

    Returns:
        A `keras.Model` to `(batch, ..., tasks, E)`, float32, tasks in the order of the `MMoE`'s
        `tasks`; over the experts they sum to 1. A list of these where the model calls the layer
        several times.

    Raises:
        ValueError: where the model is none, has no `MMoE` that is built, or several and no `layer`;
            in a call, where the model does not call the layer.

    Example:

    >>> import numpy as np
    >>> from keras_moe.models import features, multitask_ranker, task_gates
    >>> ranker = multitask_ranker([features.Numeric("x", 3)], {"click": "binary", "like": "binary"})
    >>> task_gates(ranker).predict({"x": np.zeros((5, 3))}, verbose=0).shape
    (5, 2, 4)
    """
    checks.keras_layer("model", model)  # which the gates' model holds
    gated = {name: mixture for name, mixture in named_layers(model) if isinstance(mixture, MMoE)}
    name, _ = one_layer(model, gated, layer, "an `MMoE`")
    return _TaskGates(model, name, name=f"{model.name}_gates")


@keras.saving.register_keras_serializable(package="keras_moe", name="TaskGates")
class _TaskGates(keras.Model):
    """The gate weights of a model's layer, read while the model is called.

    Args:
        model: The model.
        layer: The layer's name in it.
        **kwargs: Keyword arguments of `keras.Model`.
    """

    def __init__(self, model: keras.layers.Layer, layer: str, **kwargs: Any) -> None:
        super().__init__(**kwargs, autocast=False)  # the model casts its inputs as it likes
        self.model, self.layer = model, layer
        self.built = True

    def call(
        self, inputs: Any, training: bool | None = None, mask: Any = None
    ) -> Tensor | list[Tensor]:
        weights: list[Tensor] = []
        takes_mask = "mask" in inspect.signature(self.model.call).parameters
        masks = {} if mask is None or not takes_mask else {"mask": mask}
        mmoe = dict(named_layers(self.model))[self.layer]
        with listening(mmoe, lambda record: weights.append(record.weights)):
            self.model(inputs, training=training, **masks)
        if not weights:
            checks.fail("`model` must call its `MMoE`.", model=self.model.name, layer=self.layer)
        return weights[0] if len(weights) == 1 else weights

    def compute_mask(self, inputs: Any, previous_mask: Any) -> None:
        """Leaves no mask: gates are of all tokens."""

    def get_config(self) -> Config:
        model = keras.saving.serialize_keras_object(self.model)
        # Gates need no optimizer and no loss of the user's, which another process may not know.
        model = {key: value for key, value in model.items() if key != "compile_config"}
        return {"name": self.name, "model": model, "layer": self.layer}

    @classmethod
    def from_config(cls, config: Config, custom_objects: Any = None) -> Self:
        model = keras.saving.deserialize_keras_object(config["model"], custom_objects)
        return cls(**{**config, "model": model})
