"""What a carrier is predicted to cost, in rows that the experts could compute in the same time."""

from typing import NamedTuple

import keras


class Platform(NamedTuple):
    """Costs of one expert besides its rows, in rows it could compute in the same time.

    Attributes:
        copy: of copying an expert's weights, where a walk has to.
        waste: rows of the last block that are not the expert's own, on average.
        lookup: of gathering an expert's weights for a single row and using them once.
        dispatch: of sorting and gathering, per row.
    """

    copy: float
    waste: float
    lookup: float
    dispatch: float


# Measured on 2 CPU cores in float32: docs/design/0010-a-walk-with-its-own-gradient.md.
_PLATFORMS = {
    "jax": Platform(copy=40.0, waste=16.0, lookup=120.0, dispatch=0.1),
    "tensorflow": Platform(copy=4.0, waste=0.0, lookup=120.0, dispatch=0.1),
    "torch": Platform(copy=0.0, waste=0.0, lookup=120.0, dispatch=0.1),
}
# Portable Keras code: gathered weights, about four blocks of each expert.
_PORTABLE = Platform(copy=160.0, waste=16.0, lookup=120.0, dispatch=0.1)
_TILE = 64  # rows per tile of a grouped matmul kernel; half of one is wasted per expert


def dropless_costs(
    num_tokens: int, num_experts: int, top_k: int, *, training: bool, is_bank: bool, grouped: bool
) -> dict[str, float]:
    """Predicted cost of each dropless carrier; the limit is the k N rows that routing asks for.

    Args:
        num_tokens: the tokens N of one call.
        num_experts: the experts E.
        top_k: the experts per token k.
        training: whether gradients are taken; `lookup` would keep a copy of the weights per row.
        is_bank: whether the experts are a bank that shows its layers.
        grouped: whether there is a good native grouped matmul.
    """
    platform = _PLATFORMS.get(keras.backend.backend(), _PORTABLE) if is_bank else _PORTABLE
    rows = num_tokens * top_k
    # Experts that at least one token chooses, where all choices are as likely.
    busy = num_experts * (1 - (1 - min(top_k / num_experts, 1.0)) ** num_tokens)
    costs = {
        "blocks": rows * (1 + platform.dispatch) + busy * (platform.copy + platform.waste),
        "dense": float(num_tokens * num_experts),
    }
    if grouped and is_bank:
        # A walk is a loop with a matmul per step: what an accelerator is worst at.
        del costs["blocks"]
        costs["grouped"] = rows * (1 + platform.dispatch) + busy * _TILE / 2
    if is_bank and not training:
        costs["lookup"] = rows * platform.lookup
    return costs
