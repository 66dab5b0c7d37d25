"""Collects a layer's health metrics by display name."""

from collections.abc import Collection

import keras
import numpy as np

from keras_moe.core.types import Array
from keras_moe.inspection.health import NAMES, Counts, health


def layer_numbers(
    layer: keras.layers.Layer, counts: Counts, wanted: Collection[str] = NAMES
) -> dict[str, float]:
    """Returns the metrics of a layer, from its counts and its weights.

    Args:
        layer: a mixture layer.
        counts: what its `running_counts()` gives, or the difference of two of them.
        wanted: some of `NAMES`.

    Returns:
        Floats by name: one of each of `wanted` that the layer has, but "task_entropy" is a number
        `{task}/entropy` per task, and "task_gates" a number `{task}/expert_{e}` per gate weight.
    """
    values = health(counts, has_capacity(layer), wanted)
    if "slot_cosine" in wanted and hasattr(layer, "slot_cosines"):
        values |= _slot_cosine(layer.slot_cosines())
    if hasattr(layer, "num_tasks"):
        values |= _by_task(task_names(layer), counts, wanted)
    return values


def has_capacity(layer: keras.layers.Layer) -> bool:
    """Whether a layer can drop assignments."""
    return bool(getattr(layer, "has_capacity", False))


def has_losses(layer: keras.layers.Layer) -> bool:
    """Whether a layer adds losses of its router to the model's."""
    weights = getattr(getattr(layer, "router", None), "loss_weights", {})
    return hasattr(layer, "balance_weight") and any(weights.values())


def task_names(layer: keras.layers.Layer) -> list[str]:
    """The names of a multi-gate layer's tasks; "task_0" and so on where it has a count."""
    tasks = layer.tasks
    return [f"task_{task}" for task in range(tasks)] if isinstance(tasks, int) else list(tasks)


def _slot_cosine(cosines: Array | None) -> dict[str, float]:
    """The mean over pairs of slots, or None for a single slot and for slots without vectors."""
    if cosines is None or len(cosines) == 1:
        return {}
    return {"slot_cosine": float(cosines[~np.eye(len(cosines), dtype=bool)].mean())}


def _by_task(names: list[str], counts: Counts, wanted: Collection[str]) -> dict[str, float]:
    decisions = max(float(counts["decisions"]), 1.0)
    values = {}
    for name, entropy, gate in zip(names, counts["entropy"], counts["importance"], strict=True):
        if "task_entropy" in wanted:
            values[f"{name}/entropy"] = float(entropy / decisions)
        if "task_gates" in wanted:
            values |= {f"{name}/expert_{e}": float(w / decisions) for e, w in enumerate(gate)}
    return values
