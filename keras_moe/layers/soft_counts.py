"""What `SoftMoE` counts in training."""

from typing import Any

import keras
from keras import ops

from keras_moe import _numerics
from keras_moe.layers.running_sums import RunningSums
from keras_moe.routing import SoftRouting
from keras_moe.types import Tensor

_TOTALS = ("decisions", "entropy", "sequences", "dispatch_min", "dispatch_max")


class SoftCounts:
    """Sums of combine and dispatch weights, padding and tokens that are not finite left out.

    Args:
        owner: The layer that gets the weights.
        num_experts: The experts E.
        slots_per_expert: The slots P of each.
    """

    def __init__(self, owner: keras.layers.Layer, num_experts: int, slots_per_expert: int) -> None:
        self._importance = RunningSums(owner, "importance", (num_experts, slots_per_expert))
        self._totals = RunningSums(owner, "totals", (len(_TOTALS),))

    def add(self, routing: SoftRouting, mask: Tensor | None, visible: Tensor | None) -> None:
        """Counts a call.

        Args:
            routing: what was mixed.
            mask: bool `(batch, n)`, False at padding, or None.
            visible: what the router says of it: the tokens that a set of slots mixes.
        """
        if 0 in tuple(routing.combine.shape):  # torch has no minimum of nothing
            return
        combine = routing.combine
        entropy = _numerics.entropy_of(ops.sum(combine, axis=-1))  # of experts, not of slots
        # A token that is not finite has no entropy: it is left out.
        is_counted = ops.isfinite(entropy)
        if mask is not None:
            is_counted = ops.logical_and(is_counted, mask)
        combine = ops.where(is_counted[..., None, None], combine, 0.0)
        decisions = ops.sum(ops.cast(is_counted, "float32"))
        entropy = ops.sum(ops.where(is_counted, entropy, 0.0))
        self._importance.add(ops.sum(combine, axis=(0, 1)))
        self._totals.add(
            ops.stack([decisions, entropy, *_dispatch_range(routing.dispatch, mask, visible)])
        )

    def read(self) -> dict[str, Any]:
        """The sums by name, float64."""
        slots = self._importance.read()
        totals = dict(zip(_TOTALS, self._totals.read(), strict=True))
        return {"importance": slots.sum(axis=-1), "slot_importance": slots, **totals}

    def reset(self) -> None:
        """Starts again from 0."""
        self._importance.reset()
        self._totals.reset()


def _dispatch_range(dispatch: Tensor, mask: Tensor | None, visible: Tensor | None) -> list[Tensor]:
    """Sequences, and the sums over them of the smallest and largest weight of a token.

    A token's weight is that in all slots, 1 for the mean token. Of a causal layer a sequence is
    what one real token sees.
    """
    num_slots, is_causal = dispatch.shape[-1] * dispatch.shape[-2], len(dispatch.shape) == 5
    mass = ops.sum(dispatch, axis=(-2, -1))
    if visible is None:
        visible = ops.ones_like(mass, dtype="bool")
    tokens = ops.sum(ops.cast(visible, "float32"), axis=-1)
    least = ops.min(ops.where(visible, mass, float("inf")), axis=-1)
    most = ops.max(mass, axis=-1)
    is_counted = ops.logical_and(ops.isfinite(least), ops.isfinite(most))
    if is_causal and mask is not None:
        is_counted = ops.logical_and(is_counted, mask)
    return [
        ops.sum(ops.cast(is_counted, "float32")),
        *(ops.sum(ops.where(is_counted, m * tokens / num_slots, 0.0)) for m in (least, most)),
    ]
