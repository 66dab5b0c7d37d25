"""Tokens as rows: flat masks and ids, padding, and one decision for all tokens of an example."""

import math

from keras import ops

from keras_moe.core import checks
from keras_moe.core.records import Routing
from keras_moe.core.types import Axes, Tensor


def flat_mask(layer: str, inputs: Tensor, mask: Tensor | None, axes: Axes) -> Tensor | None:
    """Checks a mask and returns it as bool of shape `axes`, or None."""
    if mask is None:
        return None
    mask = ops.convert_to_tensor(mask)
    checks.mask_shape(layer, inputs, mask)
    return ops.reshape(ops.cast(mask, "bool"), axes)


def flat_token_ids(layer: str, inputs: Tensor, token_ids: Tensor | None) -> Tensor:
    """Checks token ids and returns them as int32 `(N,)`."""
    ids = None if token_ids is None else ops.convert_to_tensor(token_ids)
    checks.token_ids(layer, inputs, ids)
    return ops.reshape(ops.cast(ids, "int32"), (-1,))


def zero_where_padded(rows: Tensor, mask: Tensor | None) -> Tensor:
    """Zeros the rows `(..., d)` of padding, which may hold anything: NaN times 0 is NaN."""
    if mask is None:
        return rows
    return ops.where(ops.expand_dims(mask, -1), rows, ops.zeros_like(rows))


def pool_examples(tokens: Tensor, mask: Tensor | None, token_axes: Axes) -> tuple[Tensor, Tensor]:
    """The mean of each example's real tokens, float32 `(batch, d)`, and which have any.

    Args:
        tokens: `(N, d)`, zero at padding.
        mask: bool `(N,)`, False at padding, or None.
        token_axes: the sizes of the axes that the tokens were flattened from, batch first.
    """
    batch, per_example = token_axes[0], math.prod(token_axes[1:])
    if mask is None:
        is_token = ops.ones((batch, per_example), dtype="bool")
    else:
        is_token = ops.reshape(mask, (batch, per_example))
    # In float32, as all that a router reads: a sum of float16 tokens overflows.
    grouped = ops.reshape(ops.cast(tokens, "float32"), (batch, per_example, tokens.shape[-1]))
    count = ops.sum(ops.cast(is_token, "float32"), axis=1, keepdims=True)
    return ops.sum(grouped, axis=1) / ops.maximum(count, 1.0), ops.any(is_token, axis=1)


def spread_over_tokens(decision: Routing, mask: Tensor | None, token_axes: Axes) -> Routing:
    """The decision `(batch, k)` for each real token of its example, `(N, k)`; drops are to come."""
    per_example = math.prod(token_axes[1:])

    def spread(values: Tensor) -> Tensor:
        return ops.repeat(values, per_example, axis=0)

    kept = spread(decision.kept)
    if mask is not None:
        kept = ops.logical_and(kept, ops.expand_dims(mask, -1))
    return decision._replace(
        experts=spread(decision.experts), weights=spread(decision.weights), kept=kept, asked=kept
    )


def kept_examples(decision: Routing, kept: Tensor, token_axes: Axes) -> Routing:
    """The decision with the examples that an expert kept: those of which it kept any token."""
    top_k = kept.shape[-1]
    kept = ops.reshape(kept, (token_axes[0], math.prod(token_axes[1:]), top_k))
    return decision._replace(kept=ops.any(kept, axis=1))


def with_axes(routing: Routing, axes: Axes) -> Routing:
    """The record of `(N, ...)` with the axes that the tokens were flattened from."""
    return routing._replace(
        **{
            name: ops.reshape(values, (*axes, values.shape[-1]))
            for name in ("experts", "weights", "kept", "asked", "logits")
            for values in [getattr(routing, name)]
        }
    )
