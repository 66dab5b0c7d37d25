"""Search space of the multi-gate mixture."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from keras_moe.core import checks
from keras_moe.core.types import Config
from keras_moe.layers.expert_mlp import checked_units
from keras_moe.tuning._choices import Choices, candidates, checked

if TYPE_CHECKING:
    from keras_tuner import HyperParameters

Units = int | tuple[int, ...]


def mmoe_space(
    hp: "HyperParameters",
    name: str,
    *,
    num_experts: int | Sequence[int] = (4, 2, 8),
    expert_units: int | Sequence[Units] | None = None,
    total_units: int | Sequence[int] | None = None,
    gate_dropout: float | Sequence[float] = (0.0, 0.1),
    dropout: float | Sequence[float] = 0.0,
) -> Config:
    """Draws the arguments of a `MMoE` layer, all but its tasks.

    Each argument is a value, which stays out of the search, or a list or tuple of values to choose
    from, the first of them the default. Hyperparameters are named `{name}/{argument}`.

    Args:
        hp: A `keras_tuner.HyperParameters`.
        name: First part of the hyperparameters' names, another for each layer.
        num_experts: The experts E. Defaults to `(4, 2, 8)`.
        expert_units: The width of an expert's layer, or the widths of its layers as a tuple among
            the choices, `[(64, 32), (32,)]`; None for `(32, 16, 64)`. Defaults to `None`.
        total_units: In place of `expert_units`, the units of all experts, each of one layer:
            expert_units = total_units / E, rounded, so that every choice of `num_experts` costs
            the same. Defaults to `None`.
        gate_dropout: The probability that training leaves an expert out of a gate. Defaults to
            `(0.0, 0.1)` (0.1 from Zhao et al. 2019).
        dropout: Dropout after each expert layer. Defaults to `0.0`.

    Returns:
        A dict of arguments of `MMoE`; empty inside of a conditional scope that is not active.

    Raises:
        ValueError: on no values to choose from, values out of range, or both widths given.

    Example:

    >>> import keras_tuner
    >>> from keras_moe import layers, tuning
    >>> hp = keras_tuner.HyperParameters()
    >>> arguments = tuning.mmoe_space(hp, "mmoe")
    >>> arguments
    {'num_experts': 4, 'expert_units': 32, 'gate_dropout': 0.0, 'dropout': 0.0}
    >>> layer = layers.MMoE(**arguments, tasks=["click", "like"])

    Reference:
        Ma et al. 2018, "Modeling Task Relationships in Multi-task Learning with Multi-gate
        Mixture-of-Experts", section 4.2; Zhao et al. 2019, "Recommending What Video to Watch Next:
        A Multitask Ranking System", section 5.
    """
    checked(checks.positive_int, "num_experts", num_experts)
    checked(checks.rate, "gate_dropout", gate_dropout)
    checked(checks.rate, "dropout", dropout)
    if expert_units is not None and total_units is not None:
        checks.fail(
            "`expert_units` must be None where `total_units` is given.",
            expert_units=expert_units,
            total_units=total_units,
        )
    width: str = "expert_units"
    widths: Any = (32, 16, 64) if expert_units is None else expert_units
    if total_units is None:
        checked(checked_units, width, widths)
    else:
        width, widths = "total_units", total_units
        checked(checks.positive_int, width, widths)
        most_experts = max(candidates("num_experts", num_experts))
        if min(candidates(width, widths)) < most_experts:
            checks.fail(
                f"`total_units` must be at least {most_experts}, the most experts.",
                total_units=total_units,
            )

    choices = Choices(hp, name)
    experts = choices.draw("num_experts", num_experts)
    units = choices.draw(width, widths)
    gate_rate = choices.draw("gate_dropout", gate_dropout)
    rate = choices.draw("dropout", dropout)
    if not choices.is_active:
        return {}
    return {
        "num_experts": experts,
        "expert_units": units if total_units is None else round(units / experts),
        "gate_dropout": gate_rate,
        "dropout": rate,
    }
