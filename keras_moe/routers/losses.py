"""Auxiliary losses of routers: masked, normalised, and free of NaN gradients.

Every loss takes float32 and an optional token mask `(N,)`; padding is in neither the numerator nor
the denominator, and an all-padding batch costs exactly 0.
"""

import math

from keras import ops

from keras_moe.core.numerics import entropy_of
from keras_moe.core.sizes import as_tensor, at_least
from keras_moe.core.types import Size, Tensor
from keras_moe.dispatch import backend


def token_count(tokens: Tensor, mask: Tensor | None) -> float | Tensor:
    """The number of real tokens, at least 1 so that it can be divided by: a number, or float32."""
    if mask is not None:
        return ops.maximum(ops.sum(ops.cast(mask, "float32")), 1.0)
    count = ops.shape(tokens)[0]
    if isinstance(count, int):
        return float(max(count, 1))
    return ops.maximum(as_tensor(count, "float32"), 1.0)


def masked_sum(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sums `(N, ...)` over the tokens; `where`, not a product, since padding may hold NaN."""
    if mask is not None:
        shape = (-1,) + (1,) * (len(values.shape) - 1)
        values = ops.where(ops.reshape(mask, shape), values, ops.zeros_like(values))
    return ops.sum(values, axis=0)


def balance_loss(
    probabilities: Tensor,
    load: Tensor,
    top_k: int,
    mask: Tensor | None,
    over_replicas: bool = False,
) -> Tensor:
    """E * sum_e f_e P_e: 1 at perfect balance for every E and k.

    f_e is expert e's share of the k N assignments (so sum_e f_e = 1, not k as in HF, MaxText and
    flaxformer), P_e its mean probability. The gradient flows through P alone.

    Args:
        probabilities: float32 `(N, E)`, softmax of the logits.
        load: float32 `(E,)`, assignments per expert before drops.
        top_k: experts per token.
        mask: bool `(N,)`, False at padding, or None.
        over_replicas: whether f is that of all replicas. The mean over replicas is then the loss of
            the whole batch, where they have as many tokens each.

    Returns:
        A float32 scalar.

    Reference:
        Fedus et al. 2021, "Switch Transformers", equations 4 to 6; Qiu et al. 2025, "Demons in the
        Detail", section 2 (over replicas).
    """
    count = token_count(probabilities, mask)
    num_experts = probabilities.shape[-1]
    total, tokens = ops.stop_gradient(load), count
    if over_replicas:
        tokens = ops.convert_to_tensor(count, "float32")
        total, tokens = backend.current.sum_over_replicas((total, tokens))
    fractions = total / (tokens * top_k)
    mean_probabilities = masked_sum(probabilities, mask) / count
    return num_experts * ops.sum(fractions * mean_probabilities)


def sequence_balance_loss(
    probabilities: Tensor,
    experts: Tensor,
    is_chosen: Tensor,
    num_sequences: Size,
    mask: Tensor | None,
) -> Tensor:
    """The balance loss of each sequence on its own, and the mean of these.

    mean over sequences b of E * sum_e f_{b,e} P_{b,e}, with f_{b,e} the share of expert e in the
    assignments of sequence b, P_{b,e} its mean probability there: 1 where each sequence is in
    perfect balance, for every E and k. A sequence of nothing but padding is left out of the mean.

    Args:
        probabilities: float32 `(N, E)`, each token's shares, which sum to 1: with sigmoid scores,
            the scores divided by their sum.
        experts: int32 `(N, k)`, the chosen experts before drops.
        is_chosen: bool `(N, k)`, False at padding and for experts that a token does not take.
        num_sequences: how many sequences of equal length the tokens are, in order.
        mask: bool `(N,)`, False at padding, or None.

    Returns:
        A float32 scalar.

    Reference:
        DeepSeek-AI 2024, "DeepSeek-V3", equations 17 to 20, where alpha is 1e-4.
    """
    if probabilities.shape[0] == 0:  # torch has no sums of no segments
        return ops.zeros((), dtype="float32")
    num_experts = probabilities.shape[-1]
    sequence = _sequence_of(probabilities, num_sequences)
    load = backend.current.segment_sum(
        ops.reshape(ops.cast(is_chosen, "float32"), (-1,)),
        ops.reshape(experts + num_experts * ops.expand_dims(sequence, -1), (-1,)),
        num_segments=num_experts * num_sequences,
    )
    load = ops.stop_gradient(ops.reshape(load, (num_sequences, num_experts)))
    fractions = load / ops.maximum(ops.sum(load, axis=-1, keepdims=True), 1.0)
    total, real = _sums_of_sequences(probabilities, sequence, num_sequences, mask)
    mean = total / ops.maximum(ops.expand_dims(real, -1), 1.0)
    losses = num_experts * ops.sum(fractions * mean, axis=-1)  # 0 where all is padding
    return ops.sum(losses) / token_count(losses, real > 0)


def _sequence_of(tokens: Tensor, num_sequences: Size) -> Tensor:
    """The sequence of each token, int32 `(N,)`, of equal lengths."""
    count = ops.shape(tokens)[0]
    length = at_least(count // at_least(num_sequences, 1), 1)
    return ops.arange(count, dtype="int32") // length


def _sums_of_sequences(
    values: Tensor, sequence: Tensor, num_sequences: Size, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The sums of `(N, E)` over each sequence's real tokens, and how many these are."""
    is_token = ops.ones_like(sequence, dtype="bool") if mask is None else mask
    real, sums = (
        backend.current.segment_sum(each, sequence, num_segments=num_sequences)
        for each in (
            ops.cast(is_token, "float32"),
            ops.where(ops.expand_dims(is_token, -1), values, 0.0),
        )
    )
    return sums, real


def local_entropy_loss(probabilities: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens of the entropy of a token's distribution, over ln E: it makes routers sure.

    1 where every token finds all experts alike, 0 where each is certain, for every E.

    Args:
        probabilities: float32 `(N, E)`, each token's shares, which sum to 1.
        mask: bool `(N,)`, False at padding, or None.

    Returns:
        A float32 scalar.

    Reference:
        Mustafa et al. 2022, "Multimodal Contrastive Learning with LIMoE", local entropy loss.
    """
    per_token = _entropy(probabilities)
    return masked_sum(per_token, mask) / token_count(probabilities, mask)


def global_entropy_loss(probabilities: Tensor, mask: Tensor | None) -> Tensor:
    """1 - entropy of the mean distribution over ln E: it makes routers use all experts.

    0 at perfect balance of the mean probabilities, 1 where one expert has all, for every E.

    Args:
        probabilities: float32 `(N, E)`, each token's shares, which sum to 1.
        mask: bool `(N,)`, False at padding, or None.

    Returns:
        A float32 scalar.

    Reference:
        Mustafa et al. 2022, "Multimodal Contrastive Learning with LIMoE", global entropy loss,
        without its threshold.
    """
    if probabilities.shape[-1] == 1:
        return ops.zeros((), dtype="float32")
    mean = masked_sum(probabilities, mask) / token_count(probabilities, mask)
    # All is 0 where every token is padding, and then so is the loss.
    return ops.where(ops.any(mean > 0), 1.0 - _entropy(mean), 0.0)


def _entropy(probabilities: Tensor) -> Tensor:
    """Entropy over the last axis, in units of ln E."""
    num_experts = probabilities.shape[-1]
    if num_experts == 1:
        return ops.zeros_like(probabilities[..., 0])
    return entropy_of(probabilities) / math.log(num_experts)


def z_loss(logits: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2, which keeps the router's logits small.

    Args:
        logits: float32 `(N, E)`; never probabilities, whose logsumexp says nothing.
        mask: bool `(N,)`, False at padding, or None.

    Returns:
        A float32 scalar.

    Reference:
        Zoph et al. 2022, "ST-MoE", equation 5.
    """
    per_token = ops.square(ops.logsumexp(logits, axis=-1))
    return masked_sum(per_token, mask) / token_count(logits, mask)


def cv_squared(amounts: Tensor | None, mask: Tensor | None) -> Tensor:
    """The squared coefficient of variation over the experts of what all tokens give them.

    The importance loss, of the experts' weights, and the load loss, of their chances to be chosen:
    variance / mean^2, 0 where all experts get as much. Not (standard deviation / mean)^2, whose
    gradient is NaN at perfect balance (V-MoE).

    Args:
        amounts: float32 `(N, E)`, or None for a loss of 0.
        mask: bool `(N,)`, False at padding, or None.

    Returns:
        A float32 scalar.

    Reference:
        Shazeer et al. 2017, "Outrageously Large Neural Networks", equations 6 to 11.
    """
    if amounts is None:
        return ops.zeros((), dtype="float32")
    return _cv_squared_of(masked_sum(amounts, mask))


def sequence_cv_squared(amounts: Tensor | None, num_sequences: Size, mask: Tensor | None) -> Tensor:
    """`cv_squared` of each sequence on its own, and the mean of these.

    A sequence of nothing but padding is left out of the mean.

    Args:
        amounts: float32 `(N, E)`, or None for a loss of 0.
        num_sequences: how many sequences of equal length the tokens are, in order.
        mask: bool `(N,)`, False at padding, or None.

    Returns:
        A float32 scalar.

    Reference:
        Riquelme et al. 2021, "Scaling Vision with Sparse Mixture of Experts", whose code takes both
        losses in each group of tokens.
    """
    if amounts is None or amounts.shape[0] == 0:  # torch has no sums of no segments
        return ops.zeros((), dtype="float32")
    sequence = _sequence_of(amounts, num_sequences)
    totals, real = _sums_of_sequences(amounts, sequence, num_sequences, mask)
    values = _cv_squared_of(totals)
    return ops.sum(values) / token_count(values, real > 0)


def _cv_squared_of(totals: Tensor) -> Tensor:
    """Variance / mean^2 over the last axis; 0 where all is 0, as every token is padding."""
    mean = ops.mean(totals, axis=-1, keepdims=True)
    variance = ops.mean(ops.square(totals - mean), axis=-1)
    return variance / ops.maximum(ops.square(mean[..., 0]), 1e-20)
