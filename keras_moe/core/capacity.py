"""Slots per expert: a number, or a share of the tokens."""

import dataclasses

from keras_moe.core import checks
from keras_moe.core.numerics import slots_per_expert
from keras_moe.core.sizes import at_most
from keras_moe.core.types import Size


@dataclasses.dataclass(frozen=True)  # no tuple: TensorFlow wraps those of a layer
class Capacity:
    """Number of tokens that an expert takes of each capacity group.

    Attributes:
        slots: the slots C, or None where the group's size sets them.
        factor: C over k N / E in training, or None.
        eval_factor: the same at inference; None for the same as in training.
    """

    slots: int | None
    factor: float | None
    eval_factor: float | None

    def of(self, count: Size, load: float, training: bool | None) -> Size | None:
        """C, at most N since no token needs an expert twice; None where nothing limits it.

        Args:
            count: the tokens N of a group, padding included.
            load: k / E, what a token asks of an expert on average.
            training: whether the training factor is taken.
        """
        if self.slots is not None:
            return at_most(count, self.slots)
        is_eval = not training and self.eval_factor is not None
        factor = self.eval_factor if is_eval else self.factor
        return None if factor is None else slots_per_expert(factor * load, count)


def capacity_of(slots: object, factor: object, eval_factor: object) -> Capacity:
    """Checks the arguments `capacity`, `capacity_factor` and `eval_capacity_factor`."""
    capacity = Capacity(
        checks.optional(checks.positive_int, "capacity", slots),
        checks.optional(checks.positive, "capacity_factor", factor),
        checks.optional(checks.positive, "eval_capacity_factor", eval_factor),
    )
    if slots is not None and factor is not None:
        checks.fail(
            "`capacity` must be None, or `capacity_factor` must: both say how many slots an "
            "expert has.",
            capacity=slots,
            capacity_factor=factor,
        )
    if factor is None and eval_factor is not None:
        checks.fail(
            "`eval_capacity_factor` needs a `capacity_factor`.", eval_capacity_factor=eval_factor
        )
    return capacity
