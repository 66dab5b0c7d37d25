"""What a multi-task model's gates do."""

import keras

from keras_moe import _checks
from keras_moe.layers import MMoE
from keras_moe.models._masked_model import MaskedModel


def task_gates(model: keras.Model) -> keras.Model:
    """Returns a model from the inputs of a `multitask_ranker` to the weights of its gates.

    It shares the ranker's weights, so it can be made before training, and follows it.

    Args:
        model: A functional model with one `MMoE`, such as `multitask_ranker` returns, also after
            loading it from a file.

    Returns:
        A `keras.Model` to `(batch, tasks, E)`, float32, tasks in the order of the `MMoE`'s `tasks`;
        over the experts they sum to 1.

    Raises:
        ValueError: if there is no `MMoE` in the model, or more than one.

    Example:

    >>> import numpy as np
    >>> from keras_moe.models import features, multitask_ranker, task_gates
    >>> ranker = multitask_ranker([features.Numeric("x", 3)], {"click": "binary", "like": "binary"})
    >>> task_gates(ranker).predict({"x": np.zeros((5, 3))}, verbose=0).shape
    (5, 2, 4)
    """
    mixtures = [layer for layer in model.layers if isinstance(layer, MMoE)]
    if len(mixtures) != 1:
        _checks.fail(
            "`model` must have one `MMoE` layer.",
            model=model.name,
            mixtures=[layer.name for layer in mixtures],
        )
    (mmoe,) = mixtures
    _, routing = mmoe(mmoe.input, return_routing=True)
    return MaskedModel(model.input, routing.weights, name=f"{model.name}_gates")
