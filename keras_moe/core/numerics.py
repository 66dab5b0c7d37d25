"""Small numerical functions that Keras lacks."""

from fractions import Fraction

import keras
from keras import ops

from keras_moe.core.exporting import is_exporting
from keras_moe.core.types import Size, Tensor

# A mark below all scores. Finite: ONNX has no choice between a number and an infinity, since it
# multiplies by 0 and 1, and checks of numbers such as TensorFlow's stop at an infinity.
LOWEST = -3.4e38

_LARGEST_DENOMINATOR = 10_000  # of slots per token


def as_float(inputs: Tensor, dtype: str) -> Tensor:
    """Casts integers and bools to a dtype of floats, as `Dense` does. Floats stay as they are.

    Sparse tensors become dense ones: tokens that are moved, masked and mixed.
    """
    is_float = keras.backend.is_float_dtype(keras.backend.standardize_dtype(inputs.dtype))
    inputs = inputs if is_float else ops.cast(inputs, dtype)
    return ops.convert_to_tensor(inputs, sparse=False)


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
    return entropy_of(softmax(logits))


def entropy_of(p: Tensor) -> Tensor:
    """Entropy in nats of probabilities over the last axis; 0 log 0 is 0, with a finite gradient."""
    return -ops.sum(p * ops.log(ops.where(p > 0, p, 1.0)), axis=-1)


def slots_per_expert(slots_per_token: float, count: Size) -> Size:
    """C = ceil(capacity_factor k / E * N), at most N since no token needs an expert twice.

    In integers: symbols of an export know nothing else, and a product of floats such as
    1.1 * 10 / 11 may be above the number that is meant.
    """
    rate = Fraction(slots_per_token).limit_denominator(_LARGEST_DENOMINATOR)
    if rate >= 1:
        return count
    if not hasattr(count, "dtype"):
        return _rounded_up(count, rate)
    # Quotient and rest apart: the product of many tokens and the numerator would overflow int32.
    whole, rest = count // rate.denominator, count % rate.denominator
    return whole * rate.numerator + _rounded_up(rest, rate)


def _rounded_up(count: Size, rate: Fraction) -> Size:
    return (count * rate.numerator + rate.denominator - 1) // rate.denominator


def edges_of(sorted_bins: Tensor, num_bins: Size) -> Tensor:
    """Where each bin begins among sorted bin numbers, and where the last one ends.

    Args:
        sorted_bins: int32 `(A,)`, `num_bins` for what is in no bin.
        num_bins: how many bins there are.

    Returns:
        int32 `(num_bins + 1,)`.
    """
    if is_exporting() or not isinstance(ops.shape(sorted_bins)[0], int):
        # No export format has a binary search, and JAX cannot trace one over an unknown size.
        ones = ops.ones_like(sorted_bins)
        counts = ops.segment_sum(ones, sorted_bins, num_segments=num_bins + 1)
        return ops.cumsum(counts) - counts
    bins = ops.arange(num_bins + 1, dtype="int32")
    return ops.cast(ops.searchsorted(sorted_bins, bins, side="left"), "int32")
