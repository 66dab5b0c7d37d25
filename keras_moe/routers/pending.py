"""Sums over the batches between two changes of what follows the load."""

from keras import ops

from keras_moe.core.types import Tensor
from keras_moe.routers.base import Router


class PendingSums:
    """Sums of what a router saw since its last change, for changes every few batches.

    With `every` above 1 they are a float32 weight of the router, `pending (size + 1,)`: the sums
    and the number of batches.

    Args:
        owner: The router that gets the weight.
        size: Number of sums.
        every: Training batches per change.
    """

    def __init__(self, owner: Router, size: int, every: int) -> None:
        self._every = every
        self._sums = None
        if every > 1:
            self._sums = owner.add_weight(
                name="pending",
                shape=(size + 1,),
                initializer="zeros",
                dtype="float32",
                trainable=False,
                autocast=False,
            )

    def add(self, values: Tensor) -> tuple[Tensor, Tensor | float]:
        """Adds one batch's `(size,)`.

        Returns:
            The sums since the last change, and 1 where a change is due, else 0.
        """
        if self._sums is None:
            return values, 1.0
        one = ops.ones((1,), dtype="float32")
        sums = self._sums + ops.concatenate([ops.stop_gradient(values), one])
        is_due = ops.cast(sums[-1] >= self._every, "float32")
        self._sums.assign(sums * (1.0 - is_due))
        return sums[:-1], is_due
