"""Constraints of stacked expert weights."""

import keras
from keras import ops

from keras_moe.core.types import Config, ConstraintLike, Tensor


@keras.saving.register_keras_serializable(package="keras_moe")
class PerExpertConstraint(keras.constraints.Constraint):
    """Applies a constraint to each expert's slice of an `(E, ...)` weight.

    Keras's constraints work along axis 0 by default, which is the inputs of one expert's kernel and
    the experts of a stacked one.

    Args:
        constraint: The constraint of one expert's weight.
    """

    def __init__(self, constraint: ConstraintLike) -> None:
        self.constraint = keras.constraints.get(constraint)

    def __call__(self, w: Tensor) -> Tensor:
        stacked = ops.convert_to_tensor(w)
        slices = ops.unstack(stacked, num=stacked.shape[0])
        return ops.stack([self.constraint(one) for one in slices])

    def get_config(self) -> Config:
        return {"constraint": keras.constraints.serialize(self.constraint)}

    @classmethod
    def from_config(cls, config: Config) -> "PerExpertConstraint":
        return cls(**config)


def per_expert(constraint: ConstraintLike) -> PerExpertConstraint | None:
    """The constraint for a stack of experts, or None for none."""
    return None if constraint is None else PerExpertConstraint(constraint)
