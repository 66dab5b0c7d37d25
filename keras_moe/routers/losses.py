"""Auxiliary losses of routers: masked, normalised, and free of NaN gradients.

Every loss takes float32 and an optional token mask `(N,)`; padding is in neither the numerator nor
the denominator, and an all-padding batch costs exactly 0.
"""

from keras import ops

from keras_moe.types import Tensor


def token_count(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The number of real tokens as a float32 scalar, at least 1 so that it can be divided by."""
    if mask is None:
        count = ops.cast(ops.shape(tokens)[0], "float32")
    else:
        count = ops.sum(ops.cast(mask, "float32"))
    return ops.maximum(count, 1.0)


def masked_sum(values: Tensor, mask: Tensor | None) -> Tensor:
    """Sums `(N, ...)` over the tokens; `where`, not a product, since padding may hold NaN."""
    if mask is not None:
        shape = (-1,) + (1,) * (len(values.shape) - 1)
        values = ops.where(ops.reshape(mask, shape), values, ops.zeros_like(values))
    return ops.sum(values, axis=0)


def balance_loss(probabilities: Tensor, load: Tensor, top_k: int, mask: Tensor | None) -> Tensor:
    """E * sum_e f_e P_e: 1 at perfect balance for every E and k.

    f_e is expert e's share of the k N assignments (so sum_e f_e = 1, not k as in HF, MaxText and
    flaxformer), P_e its mean probability. The gradient flows through P alone.

    Args:
        probabilities: float32 `(N, E)`, softmax of the logits.
        load: float32 `(E,)`, assignments per expert before drops.
        top_k: experts per token.
        mask: bool `(N,)`, False at padding, or None.

    Returns:
        A float32 scalar.

    Reference:
        Fedus et al. 2021, "Switch Transformers", equations 4 to 6.
    """
    count = token_count(probabilities, mask)
    num_experts = probabilities.shape[-1]
    fractions = ops.stop_gradient(load) / (count * top_k)
    mean_probabilities = masked_sum(probabilities, mask) / count
    return num_experts * ops.sum(fractions * mean_probabilities)


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


def cv_squared(amounts: Tensor, mask: Tensor | None) -> Tensor:
    """The squared coefficient of variation over the experts of what all tokens give them.

    The importance loss, of the experts' weights, and the load loss, of their chances to be chosen:
    variance / mean^2, 0 where all experts get as much. Not (standard deviation / mean)^2, whose
    gradient is NaN at perfect balance (V-MoE).

    Args:
        amounts: float32 `(N, E)`.
        mask: bool `(N,)`, False at padding, or None.

    Returns:
        A float32 scalar.

    Reference:
        Shazeer et al. 2017, "Outrageously Large Neural Networks", equations 6 to 11.
    """
    total = masked_sum(amounts, mask)
    mean = ops.mean(total)
    variance = ops.mean(ops.square(total - mean))
    # All is 0 where every token is padding, and then so is the loss.
    return variance / ops.maximum(ops.square(mean), 1e-20)
