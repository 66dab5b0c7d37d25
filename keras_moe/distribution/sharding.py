"""A check that experts are divided among devices, and not on all of them."""

from typing import Any

import keras

from keras_moe.core import checks
from keras_moe.layers import ExpertMLP, LayerExperts


def assert_sharded(model: keras.layers.Layer) -> None:
    """Fails where weights of experts, or what an optimizer keeps for them, are on every device.

    A rule of a `keras.distribution.LayoutMap` that matches no path says nothing: each device then
    holds all experts, and training is right and as slow as before. Call this after the model is
    built, or after `fit` began, for the optimizer's variables too.

    Args:
        model: A model or layer with mixtures.

    Raises:
        ValueError: With the paths of what is not divided, or where the model has no experts.
    """
    # Not those of all tokens: shared experts, and the hidden layers of gates.
    banks = [
        bank
        for layer in model._flatten_layers()
        for bank in [getattr(layer, "experts", None)]
        if isinstance(bank, ExpertMLP | LayerExperts)
    ]
    weights = {id(weight): weight for bank in banks for weight in bank.weights}
    if not weights:
        checks.fail(
            "`model` must have experts, and be built: there is nothing that could be divided.",
            model=model.name,
        )
    whole = [weight.path for weight in weights.values() if not _is_divided(weight)]
    # An optimizer's variable is named after its weight, and then what it is.
    owners = tuple(weight.path.replace("/", "_") + "_" for weight in weights.values())
    shapes = {tuple(weight.shape) for weight in weights.values()}
    for variable in getattr(getattr(model, "optimizer", None), "variables", []):
        is_of_experts = variable.path.split("/")[-1].startswith(owners)
        if is_of_experts and tuple(variable.shape) in shapes and not _is_divided(variable):
            whole.append(variable.path)
    if whole:
        checks.fail(
            "Each device has all experts of: "
            + ", ".join(whole)
            + ". Make the model under `keras_moe.distribution.expert_parallel()`, or mend the rule "
            "that should have matched these paths. Experts that are Keras layers have weights of "
            "their own each, which no rule divides.",
            model=model.name,
        )


def _is_divided(variable: Any) -> bool:
    """Whether a variable's first axis is in parts on several devices."""
    shards = getattr(variable.value, "addressable_shards", ())
    return any(shard.data.shape[0] < variable.shape[0] for shard in shards)
