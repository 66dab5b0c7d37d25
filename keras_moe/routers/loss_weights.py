"""Coefficients of losses that a layer has no argument for."""

from typing import Any

from keras_moe.core import checks
from keras_moe.routers.base import Router
from keras_moe.routers.registry import rules_with


def refuse_loss_weights(
    layer: type, kwargs: dict[str, Any], rule: type[Router] | None = None
) -> None:
    """Fails where an argument is the coefficient of a loss, and says where it goes.

    Args:
        layer: the class of the layer.
        kwargs: its arguments that have no name of their own.
        rule: a router that it may have; None where it has no losses.
    """
    for name, value in kwargs.items():
        if not name.endswith("_weight"):
            continue
        loss = name.removesuffix("_weight")
        owners = rules_with(loss)
        if rule is None or not owners:
            checks.fail(
                f"`{layer.__name__}` has no `{name}`: "
                + ("it has no auxiliary losses." if rule is None else "no router has that loss."),
                **{name: value},
            )
        example = (rule if rule in owners else owners[0]).__name__
        checks.fail(
            f"`{layer.__name__}` has no `{name}`: a router brings the coefficient, "
            f"`MoE(..., router={example}(num_experts, losses={{{loss!r}: {value!r}}}))`. "
            f"Those with this loss are {[owner.__name__ for owner in owners]}.",
            **{name: value},
        )
