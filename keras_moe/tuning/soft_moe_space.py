"""Search space of the soft mixture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from keras_moe.core import checks
from keras_moe.core.types import Config
from keras_moe.tuning._choices import Choices, candidates, checked

if TYPE_CHECKING:
    from keras_tuner import HyperParameters


def soft_moe_space(
    hp: "HyperParameters",
    name: str,
    *,
    num_experts: int | Sequence[int] = (16, 8, 32),
    hidden_dim: int | Sequence[int] = (128, 64, 256),
    slots_per_expert: int | Sequence[int] | None = None,
    num_slots: int | Sequence[int] | None = None,
    dropout: float | Sequence[float] = 0.0,
) -> Config:
    """Draws the arguments of a `SoftMoE` layer.

    Each argument is a value, which stays out of the search, or a list or tuple of values to choose
    from, the first of them the default. Hyperparameters are named `{name}/{argument}`.

    Args:
        hp: A `keras_tuner.HyperParameters`.
        name: First part of the hyperparameters' names, another for each layer.
        num_experts: The experts E. Defaults to `(16, 8, 32)`.
        hidden_dim: The hidden width h of each expert. Defaults to `(128, 64, 256)`.
        slots_per_expert: The slots P of each expert; None for 1, the paper's best. Defaults to
            `None`.
        num_slots: In place of `slots_per_expert`, the slots E P of all experts, which set the cost:
            P = num_slots / E, rounded. As many slots as tokens cost the FLOPs of a dense layer of
            the same hidden width. Defaults to `None`.
        dropout: Dropout after the experts' hidden layer. Defaults to `0.0`.

    Returns:
        A dict of arguments of `SoftMoE`; empty inside of a conditional scope that is not active.

    Raises:
        ValueError: on no values to choose from, values out of range, fewer slots than experts, or
            both numbers of slots given.

    Example:

    >>> import keras_tuner
    >>> from keras_moe import layers, tuning
    >>> hp = keras_tuner.HyperParameters()
    >>> tuning.soft_moe_space(hp, "block_3", num_slots=64, hidden_dim=256)
    {'num_experts': 16, 'hidden_dim': 256, 'slots_per_expert': 4, 'dropout': 0.0}

    Reference:
        Puigcerver et al. 2023, "From Sparse to Soft Mixtures of Experts", section 2.3 (cost),
        section 3.3 (slots per expert).
    """
    checked(checks.positive_int, "num_experts", num_experts)
    checked(checks.positive_int, "hidden_dim", hidden_dim)
    checked(checks.rate, "dropout", dropout)
    if slots_per_expert is not None and num_slots is not None:
        checks.fail(
            "`slots_per_expert` must be None where `num_slots` is given.",
            slots_per_expert=slots_per_expert,
            num_slots=num_slots,
        )
    count, counts = "slots_per_expert", 1 if slots_per_expert is None else slots_per_expert
    if num_slots is not None:
        count, counts = "num_slots", num_slots
    checked(checks.positive_int, count, counts)
    most_experts = max(candidates("num_experts", num_experts))
    if num_slots is not None and min(candidates(count, counts)) < most_experts:
        checks.fail(
            f"`num_slots` must be at least {most_experts}, the most experts: each has a slot.",
            num_slots=num_slots,
            num_experts=num_experts,
        )

    choices = Choices(hp, name)
    experts = choices.draw("num_experts", num_experts)
    hidden = choices.draw("hidden_dim", hidden_dim)
    slots = choices.draw(count, counts)
    rate = choices.draw("dropout", dropout)
    if not choices.is_active:
        return {}
    return {
        "num_experts": experts,
        "hidden_dim": hidden,
        "slots_per_expert": slots if num_slots is None else round(slots / experts),
        "dropout": rate,
    }
