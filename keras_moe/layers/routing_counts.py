"""What a sparse layer counts in training: loads, drops, and how sure its router is."""

from typing import Any

import keras
from keras import ops

from keras_moe.layers.running_sums import RunningSums
from keras_moe.routing import Routing
from keras_moe.types import Tensor

_TOTALS = ("assignments", "dropped", "decisions", "entropy", "confidence")  # as counted


class RoutingCounts:
    """Running counts of routing decisions, as non-trainable weights of a layer.

    Args:
        owner: The layer that gets the weights.
        num_experts: The number of experts E.
    """

    def __init__(self, owner: keras.layers.Layer, num_experts: int) -> None:
        self._load = RunningSums(owner, "load", (num_experts,))
        self._totals = RunningSums(owner, "totals", (len(_TOTALS),))

    def add(self, decision: Routing, asked: Tensor, kept: Tensor) -> None:
        """Counts one batch.

        Args:
            decision: what the router decided, before drops.
            asked: bool `(N, k)`, the assignments of the tokens before drops.
            kept: bool `(N, k)`, those that were carried.
        """
        if decision.logits.shape[0] == 0:  # torch has no maximum of nothing
            return
        log_p = ops.log_softmax(decision.logits, axis=-1)
        p = ops.exp(log_p)
        entropy = -ops.sum(p * log_p, axis=-1)
        # A token that is not finite has no entropy: it is left out of the mean.
        is_decided = ops.logical_and(ops.any(decision.kept, axis=-1), ops.isfinite(entropy))
        assignments = ops.sum(ops.cast(asked, "float32"))
        totals = (
            assignments,
            assignments - ops.sum(ops.cast(kept, "float32")),
            ops.sum(ops.cast(is_decided, "float32")),
            ops.sum(ops.where(is_decided, entropy, 0.0)),
            ops.sum(ops.where(is_decided, ops.max(p, axis=-1), 0.0)),
        )
        self._load.add(decision.load)
        self._totals.add(ops.stack(totals))

    def read(self) -> dict[str, Any]:
        """The counts since the last reset, float64."""
        return {"load": self._load.read(), **dict(zip(_TOTALS, self._totals.read(), strict=True))}

    def reset(self) -> None:
        """Starts again from 0."""
        self._load.reset()
        self._totals.reset()
