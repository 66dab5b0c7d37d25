"""Dropless dispatch with the platform's own grouped matmul."""

from collections.abc import Sequence

import keras
from keras import ops

from keras_moe._exporting import is_exporting
from keras_moe.dispatch import native
from keras_moe.dispatch.blocks import BlocksCarrier
from keras_moe.dispatch.carrier import Carrier, ExpertBank
from keras_moe.dispatch.layout import Stage
from keras_moe.dispatch.ragged import by_rows, carry_ragged, takes_groups
from keras_moe.routing import Routing
from keras_moe.types import Tensor


@keras.saving.register_keras_serializable(package="keras_moe")
class GroupedCarrier(Carrier):
    """Sorts assignments by expert and multiplies them with a native grouped matmul.

    `torch.nn.functional.grouped_mm` on PyTorch, `jax.lax.ragged_dot` on JAX. Whether the platform
    has a good one is found out at first use, and checked against the portable path: see
    `keras_moe.dispatch.native`. The backward pass keeps the rows and all that activations read and
    gave.
    """

    name = "grouped"

    def __call__(
        self,
        tokens: Tensor,
        routing: Routing,
        experts: ExpertBank,
        *,
        capacity: int | Tensor | None = None,
        groups: int | Tensor = 1,
        training: bool | None = None,
    ) -> tuple[Tensor, Tensor]:
        del capacity, groups
        if is_exporting():
            return BlocksCarrier()(tokens, routing, experts, training=training)
        if not takes_groups(experts):
            raise ValueError(
                "The grouped carrier needs a bank such as `ExpertMLP`, whose layers it can run. "
                f"Received: experts={experts!r}"
            )
        return carry_ragged(tokens, routing, experts, by_rows(run_stages), 0, training)


def run_stages(rows: Tensor, ends: Tensor, stages: Sequence[Stage], total: int | Tensor) -> Tensor:
    """Applies the experts' layers to rows sorted by expert, with native grouped matmuls."""
    del total
    expert_of = ops.searchsorted(ends, ops.arange(ops.shape(rows)[0], dtype="int32"), side="right")
    expert_of = ops.minimum(ops.cast(expert_of, "int32"), ends.shape[0] - 1)
    for stage in stages:
        sums = [native.matmul(rows, kernel, ends) for kernel in stage.kernels]
        if stage.biases:
            by_row = [ops.take(bias, expert_of, axis=0) for bias in stage.biases]
            sums = [each + bias for each, bias in zip(sums, by_row, strict=True)]
        rows = sums[0] if stage.activation is None else stage.activation(*sums)
        if stage.scale is not None:
            rows = rows * stage.scale
    return rows
