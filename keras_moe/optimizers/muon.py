"""Muon for mixtures of experts: a step per expert, and Adam for routers, gates and biases."""

import math
import re
from typing import Any, NamedTuple

import keras

from keras_moe.core.types import Shape, Tensor

# The kernels of a bank. No layer of Keras numbers its kernels.
_BANK_KERNEL = re.compile(r"\b(gate_)?kernel_\d+$")
# Routers and gates, and biases, which may have two axes. A router built before the layer around it
# keeps its own name, "top_k_router"; a mixture may be named "router".
_NOT_HIDDEN = re.compile(r"(router(_\d+)?|\bgates)/(?!.*experts/)|\b(gate_)?bias(_\d+)?$")


class _Matrix(NamedTuple):
    """What Keras's Muon asks of a variable: the shape of one expert's kernel, and the bank's path.

    Attributes:
        shape: `(in, out)`.
        path: the path of the variable.
    """

    shape: Shape
    path: str


@keras.saving.register_keras_serializable(package="keras_moe")
class Muon(keras.optimizers.Muon):
    """Keras's Muon, which makes the step of each expert's kernels orthogonal on its own.

    update[e] = NewtonSchulz(momentum[e]) * sqrt(max(in, out)) * rms_rate, for a bank `(E, in, out)`

    Keras's own takes Adam for a bank, since it has three axes, and makes the steps of routers and
    of stacked biases `(E, out)` orthogonal, since these have two. Which rule a weight gets is told
    by its path and shape:

    - Muon for the kernels of a bank: three axes, and a name `kernel_i` or `gate_kernel_i`. No layer
      of Keras has such names; a bank of your own takes part if its kernels are named so. The hidden
      layers of `MMoE`'s gates are a bank of one network per task.
    - Adam for what lies in a router or in gates, which adopt the names `router` and `gates`
      whatever you named them, and for biases, those of a bank and of attention too.
    - For everything else, Keras's rule: Muon for two axes, but not for embeddings nor what
      `exclude_layers` names; Adam for other numbers of axes, attention and convolutions too.

    Name the last layer of your model in `exclude_layers`, as with Keras's own. Entries are regular
    expressions that are searched for in paths, `"experts/"` for example.

    Keras 3.12 scales a step by sqrt(max(1, in / out)), has no `rms_rate`, and its Muon does not run
    on TensorFlow.

    Args:
        **kwargs: Arguments of `keras.optimizers.Muon`.

    Example:

    >>> import keras, keras_moe
    >>> model = keras.Sequential([keras_moe.layers.MoE(4, 8), keras.layers.Dense(1, name="last")])
    >>> model.compile(keras_moe.optimizers.Muon(0.01, exclude_layers=["last"]), "mse")

    Reference:
        Jordan et al. 2024, "Muon: An optimizer for hidden layers in neural networks"; Liu et al.
        2025, "Muon is Scalable for LLM Training", section 2.2, which trains a mixture with it.
    """

    def _should_use_adamw(self, variable: Any) -> bool:
        shape, path = tuple(variable.shape), variable.path
        is_bank = len(shape) == 3 and _BANK_KERNEL.search(path)
        if _NOT_HIDDEN.search(path) or not (is_bank or len(shape) == 2):
            return True
        return bool(super()._should_use_adamw(_Matrix(shape[-2:], path)))

    def lr_adjust(self, x: Tensor) -> Tensor:
        """Scales a step by the axes of one matrix, where Keras takes the first two."""
        if self.rms_rate is None:
            return x
        return x * (math.sqrt(max(x.shape[-2:])) * self.rms_rate)

    def zeropower_via_newtonschulz5(self, x: Tensor, steps: int) -> Tensor:
        """Makes each matrix `(..., in, out)` nearly orthogonal."""
        update = super().zeropower_via_newtonschulz5(x, steps)
        if len(x.shape) == 3 and not hasattr(keras.optimizers.Muon, "lr_adjust"):
            # Keras 3.12, which then scales by the first two axes, (E, in).
            experts, rows, columns = x.shape
            update = update * math.sqrt(max(1, rows / columns) / max(1, experts / rows))
        return update
