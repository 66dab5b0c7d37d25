"""Counters of layers, exact over a whole epoch: weights without gradients."""

from collections.abc import Sequence
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe.core import checks, numerics
from keras_moe.core.numerics import LOWEST
from keras_moe.core.records import Routing, SoftRouting
from keras_moe.core.types import Tensor
from keras_moe.dispatch import backend
from keras_moe.layers.loops import check_outside_of_loops

_BASE = 2.0**20


def check_built(layer: keras.layers.Layer) -> None:
    """Fails with what to do where a layer has not begun to count."""
    if not layer.built:
        checks.fail(
            f"`{type(layer).__name__}` has counts once it is built: call the layer, or build it.",
            built=False,
        )


class RunningSums:
    """Sums that stay exact over a long training, in two float32 limbs.

    A single float32 stops counting at 2^24 and integers of 64 bits do not exist on JAX by default;
    here the low limb overflows into the high one, which is good to 2^44. Replicas are given equal
    values, so the first one's are kept.

    Args:
        owner: The layer that gets the weight, of shape `(2, *shape)`.
        name: Name of the weight.
        shape: Shape of the sums.
    """

    def __init__(self, owner: keras.layers.Layer, name: str, shape: tuple[int, ...] = ()) -> None:
        self.limbs = owner.add_weight(
            name=name,
            shape=(2, *shape),
            initializer="zeros",
            dtype="float32",
            trainable=False,
            autocast=False,
            aggregation="only_first_replica",
        )

    def add(self, values: Tensor) -> None:
        """Adds values, 0 for what is not finite, so that a bad batch does not end the counting."""
        check_outside_of_loops()
        values = ops.stop_gradient(ops.cast(values, "float32"))
        values = ops.where(ops.isfinite(values), values, ops.zeros_like(values))
        low = self.limbs[1] + values
        carry = ops.floor(low / _BASE)
        if not backend.current.is_recomputing():
            self.limbs.assign(ops.stack([self.limbs[0] + carry, low - carry * _BASE]))

    def read(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """The sums since the last reset, float64."""
        high, low = np.asarray(ops.convert_to_numpy(self.limbs.value), dtype=np.float64)
        total: np.ndarray[Any, np.dtype[np.float64]] = np.asarray(high * _BASE + low)
        return total

    def reset(self) -> None:
        """Starts again from 0."""
        self.limbs.assign(ops.zeros_like(self.limbs.value))


_TOTALS = ("assignments", "dropped", "decisions", "entropy", "confidence")  # as counted


_BY_BATCH = ("batches", "batch_cv", "aux_loss")
_WORST = ("worst_batch_cv", "worst_dropped")
_FINE = 1024.0  # parts of 1, so that small numbers keep their digits in large sums


class BatchCounts:
    """Sums and maxima over batches, of which an imbalance that moves from batch to batch is seen.

    The weights `batches` and `worst` are not saved: files are those of layers without them.

    Args:
        owner: The layer that gets the weights.
    """

    def __init__(self, owner: keras.layers.Layer) -> None:
        self._sums = RunningSums(owner, "batches", (len(_BY_BATCH),))
        self._worst = owner.add_weight(
            name="worst",
            shape=(len(_WORST),),
            initializer="zeros",
            dtype="float32",
            trainable=False,
            autocast=False,
            aggregation="only_first_replica",
        )

    @property
    def weights(self) -> tuple[Any, ...]:
        """The weights that files leave out."""
        return self._sums.limbs, self._worst

    def add(self, load: Tensor, assignments: Tensor, dropped: Tensor, aux_loss: Tensor) -> None:
        """Counts one batch, unless all of it is padding."""
        total = ops.maximum(ops.sum(load), 1.0)
        cv = ops.std(load) * load.shape[-1] / total
        is_counted = ops.cast(assignments > 0, "float32")
        self._sums.add(_FINE * is_counted * ops.stack([ops.ones_like(cv), cv, aux_loss]))
        worst = ops.stack([cv, dropped / ops.maximum(assignments, 1.0)])
        worst = ops.where(ops.isfinite(worst), is_counted * worst, 0.0)
        if not backend.current.is_recomputing():
            self._worst.assign(ops.maximum(self._worst.value, ops.stop_gradient(worst)))

    def read(self) -> dict[str, Any]:
        """The sums since the last reset and the largest values, float64."""
        worst = np.asarray(ops.convert_to_numpy(self._worst.value), dtype=np.float64)
        values = (*(self._sums.read() / _FINE), *worst)
        return dict(zip(_BY_BATCH + _WORST, values, strict=True))

    def reset(self) -> None:
        """Starts again from 0."""
        self._sums.reset()
        self.reset_worst()

    def reset_worst(self) -> None:
        """Starts the largest values again, whose past no difference takes away."""
        self._worst.assign(ops.zeros_like(self._worst.value))


class RoutingCounts:
    """Running counts of routing decisions, as non-trainable weights of a layer.

    Args:
        owner: The layer that gets the weights.
        num_experts: The number of experts E.
    """

    def __init__(self, owner: keras.layers.Layer, num_experts: int) -> None:
        self._load = RunningSums(owner, "load", (num_experts,))
        self._totals = RunningSums(owner, "totals", (len(_TOTALS),))
        self.by_batch = BatchCounts(owner)

    def add(self, decision: Routing, routing: Routing, losses: Sequence[Tensor]) -> None:
        """Counts one batch.

        Args:
            decision: what the router decided, about tokens or about whole examples.
            routing: what came of it for each token.
            losses: what the layer adds to the model's loss.
        """
        totals = _totals_of(decision, routing)
        aux_loss = sum((ops.cast(loss, "float32") for loss in losses), ops.zeros_like(totals[0]))
        load, totals, of_losses = backend.current.sum_over_replicas(
            (decision.load, totals, ops.stack([aux_loss, ops.ones_like(aux_loss)]))
        )
        self._load.add(load)
        self._totals.add(totals)
        self.by_batch.add(load, totals[0], totals[1], of_losses[0] / of_losses[1])

    def read(self) -> dict[str, Any]:
        """The counts since the last reset, float64."""
        totals = dict(zip(_TOTALS, self._totals.read(), strict=True))
        return {"load": self._load.read(), **totals, **self.by_batch.read()}

    def reset(self) -> None:
        """Starts again from 0."""
        for counts in (self._load, self._totals, self.by_batch):
            counts.reset()


def _totals_of(decision: Routing, routing: Routing) -> Tensor:
    """The `_TOTALS` of a batch, float32."""
    if decision.logits.shape[0] == 0:  # torch has no maximum of nothing
        return ops.zeros((len(_TOTALS),), dtype="float32")
    p = numerics.softmax(decision.logits)
    entropy = numerics.entropy_of(p)
    # A token that is not finite has no entropy: it is left out of the mean.
    is_decided = ops.logical_and(ops.any(decision.asked, axis=-1), ops.isfinite(entropy))
    assignments = ops.sum(ops.cast(routing.asked, "float32"))
    totals = (
        assignments,
        assignments - ops.sum(ops.cast(routing.kept, "float32")),
        ops.sum(ops.cast(is_decided, "float32")),
        ops.sum(ops.where(is_decided, entropy, 0.0)),
        ops.sum(ops.where(is_decided, ops.max(p, axis=-1), 0.0)),
    )
    return ops.stack(totals)


_SOFT_TOTALS = ("decisions", "entropy", "sequences", "dispatch_min", "dispatch_max")


class SoftCounts:
    """Sums of combine and dispatch weights, padding and tokens that are not finite left out.

    Args:
        owner: The layer that gets the weights.
        num_experts: The experts E.
        slots_per_expert: The slots P of each.
    """

    def __init__(self, owner: keras.layers.Layer, num_experts: int, slots_per_expert: int) -> None:
        self._importance = RunningSums(owner, "importance", (num_experts, slots_per_expert))
        self._totals = RunningSums(owner, "totals", (len(_SOFT_TOTALS),))

    def add(self, routing: SoftRouting, mask: Tensor | None, visible: Tensor | None) -> None:
        """Counts a call.

        Args:
            routing: what was mixed.
            mask: bool `(batch, n)`, False at padding, or None.
            visible: what the router says of it: the tokens that a set of slots mixes.
        """
        importance, totals = backend.current.sum_over_replicas(_soft_sums(routing, mask, visible))
        self._importance.add(importance)
        self._totals.add(totals)

    def read(self) -> dict[str, Any]:
        """The sums by name, float64."""
        slots = self._importance.read()
        totals = dict(zip(_SOFT_TOTALS, self._totals.read(), strict=True))
        return {"importance": slots.sum(axis=-1), "slot_importance": slots, **totals}

    def reset(self) -> None:
        """Starts again from 0."""
        self._importance.reset()
        self._totals.reset()


def _soft_sums(
    routing: SoftRouting, mask: Tensor | None, visible: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The importance of each slot `(E, P)` and the `_SOFT_TOTALS` of a batch, float32."""
    combine = routing.combine
    if 0 in tuple(combine.shape):  # torch has no minimum of nothing
        empty = ops.zeros(combine.shape[-2:], dtype="float32")
        return empty, ops.zeros((len(_SOFT_TOTALS),), dtype="float32")
    entropy = numerics.entropy_of(ops.sum(combine, axis=-1))  # of experts, not of slots
    # A token that is not finite has no entropy: it is left out.
    is_counted = ops.isfinite(entropy)
    if mask is not None:
        is_counted = ops.logical_and(is_counted, mask)
    combine = ops.where(is_counted[..., None, None], combine, 0.0)
    totals = (
        ops.sum(ops.cast(is_counted, "float32")),
        ops.sum(ops.where(is_counted, entropy, 0.0)),
        *_dispatch_range(routing.dispatch, mask, visible),
    )
    return ops.sum(combine, axis=(0, 1)), ops.stack(totals)


def _dispatch_range(dispatch: Tensor, mask: Tensor | None, visible: Tensor | None) -> list[Tensor]:
    """Sequences, and the sums over them of the smallest and largest weight of a token.

    A token's weight is that in all slots, 1 for the mean token. In a causal layer a sequence is
    what one real token sees.
    """
    num_slots, is_causal = dispatch.shape[-1] * dispatch.shape[-2], len(dispatch.shape) == 5
    mass = ops.sum(dispatch, axis=(-2, -1))
    if visible is None:
        visible = ops.ones_like(mass, dtype="bool")
    tokens = ops.sum(ops.cast(visible, "float32"), axis=-1)
    least = ops.min(ops.where(visible, mass, -LOWEST), axis=-1)
    most = ops.max(mass, axis=-1)
    # Not where a token is not finite, nor where none is visible.
    is_counted = ops.logical_and(least < -LOWEST, ops.isfinite(most))
    if is_causal and mask is not None:
        is_counted = ops.logical_and(is_counted, mask)
    return [
        ops.sum(ops.cast(is_counted, "float32")),
        *(ops.sum(ops.where(is_counted, m, 0.0) * tokens / num_slots) for m in (least, most)),
    ]
