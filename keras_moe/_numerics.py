"""Small numerical functions that Keras has not, or not quite."""

import math

from keras import ops

from keras_moe.types import Tensor

_ROUNDING = 1e-6  # 1.1 * 10 / 11 must give one slot, not two


def softmax(logits: Tensor, axis: int = -1) -> Tensor:
    """exp(x) / sum(exp(x)). `ops.softmax` warns about an axis of size 1, which one expert, one
    slot or one token rightly is.
    """
    if 0 in tuple(logits.shape):
        return logits  # nothing to normalise, and the maximum of nothing is an error
    exponentials = ops.exp(logits - ops.stop_gradient(ops.max(logits, axis=axis, keepdims=True)))
    return exponentials / ops.sum(exponentials, axis=axis, keepdims=True)


def normal_cdf(z: Tensor) -> Tensor:
    """The chance that a standard normal number is below z."""
    return 0.5 * (1.0 + ops.erf(z * 0.5**0.5))


def entropy(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits) over the last axis."""
    log_p = ops.log_softmax(logits, axis=-1)
    return -ops.sum(ops.exp(log_p) * log_p, axis=-1)


def entropy_of(p: Tensor) -> Tensor:
    """Entropy in nats of probabilities over the last axis, 0 log 0 being 0."""
    return -ops.sum(p * ops.log(ops.maximum(p, 1e-30)), axis=-1)


def slots_per_expert(slots_per_token: float, count: int | Tensor) -> int | Tensor:
    """C = ceil(capacity_factor k / E * N), at most N since no token needs an expert twice."""
    if isinstance(count, int):
        return min(math.ceil(slots_per_token * count - _ROUNDING), count)
    slots = ops.ceil(slots_per_token * ops.cast(count, "float64") - _ROUNDING)
    return ops.minimum(ops.cast(slots, "int32"), count)
