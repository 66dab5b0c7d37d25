"""The platform's own grouped matmul, over the same rows as a walk."""

from collections.abc import Sequence

import keras
from keras import ops

from keras_moe.core.types import Tensor
from keras_moe.dispatch import native
from keras_moe.dispatch.layout import Rows, Stage
from keras_moe.dispatch.permute import combine, gather_tokens
from keras_moe.dispatch.walk import WalkDispatcher


@keras.saving.register_keras_serializable(package="keras_moe")
class GroupedDispatcher(WalkDispatcher):
    """Sorts assignments by expert and multiplies them with a native grouped matmul.

    `torch.nn.functional.grouped_mm` on PyTorch; on JAX Triton kernels of this library on an NVIDIA
    GPU and `jax.lax.ragged_dot` elsewhere. Its values and gradients are checked at first use: see
    `keras_moe.dispatch.native`. The backward pass keeps the rows and all that activations read and
    gave.
    """

    name = "grouped"
    is_grouped = True


def grouped_walk(tokens: Tensor, rows: Rows, stages: Sequence[Stage]) -> Tensor:
    """Applies the experts' layers to all rows at once, and sums each token's, weighted."""
    hidden = gather_tokens(tokens, rows.slots, rows.weights.shape[-1])
    return combine(run_stages(hidden, rows.ends, stages), rows.slots, rows.weights)


def run_stages(rows: Tensor, ends: Tensor, stages: Sequence[Stage]) -> Tensor:
    expert_of = ops.searchsorted(ends, ops.arange(ops.shape(rows)[0], dtype="int32"), side="right")
    expert_of = ops.minimum(ops.cast(expert_of, "int32"), ends.shape[0] - 1)
    for stage in stages:
        kernels = [ops.cast(kernel, rows.dtype) for kernel in stage.kernels]
        sums = [native.matmul(rows, kernel, ends) for kernel in kernels]
        if stage.biases:
            by_row = [ops.cast(ops.take(b, expert_of, axis=0), rows.dtype) for b in stage.biases]
            sums = [total + bias for total, bias in zip(sums, by_row, strict=True)]
        rows = sums[0] if stage.activation is None else stage.activation(*sums)
        if stage.scale is not None:
            rows = rows * stage.scale
    return rows
