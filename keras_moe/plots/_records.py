"""What the layers of a model decide about data, as arrays for a picture."""

from typing import Any

import keras
import numpy as np

from keras_moe import _checks
from keras_moe._mixtures import mixture_layers, unique_names
from keras_moe.recording import record_routing

# What is read of a layer that sends tokens to experts, and of one that mixes them into slots.
SPARSE = ("experts", "weights", "kept")
SOFT = ("combine",)
# And of the gates of tasks, whose weights are for every expert.
GATES = ("weights",)


def records_of(model: Any, x: Any, batch_size: int, *kinds: tuple[str, ...]) -> dict[str, Any]:
    """What the mixture layers decide about `x`, batches joined.

    Args:
        model: A built model.
        x: Its inputs, an array or a structure of arrays.
        batch_size: Examples per call of the model.
        *kinds: The fields to keep of a record: of the first kind whose fields it has all.

    Returns:
        By layer name, a dict of arrays by field, of the layers whose records are of a kind.
    """
    parts: dict[str, dict[str, list[Any]]] = {}
    for start in range(0, len(keras.tree.flatten(x)[0]), batch_size):
        batch = keras.tree.map_structure(lambda each, at=start: each[at : at + batch_size], x)
        with record_routing(model) as records:
            model(batch, training=False)
        for name, calls in records.items():
            for record in calls:
                fields = next((kind for kind in kinds if _has(record, kind)), ())
                for field in fields:
                    found = parts.setdefault(name, {each: [] for each in fields})
                    found[field].append(getattr(record, field))
    return {
        name: {field: np.concatenate(arrays) for field, arrays in found.items()}
        for name, found in parts.items()
    }


def one_layer(by_layer: dict[str, Any], layer: str | None, kind: str) -> tuple[str, Any]:
    """The named layer's entry, or the only one.

    Raises:
        ValueError: where there is none, or several and no name.
    """
    if layer is None and len(by_layer) == 1:
        return next(iter(by_layer.items()))
    if layer not in by_layer:
        _checks.fail(f"`layer` must name {kind}: one of {sorted(by_layer)}.", layer=layer)
    return str(layer), by_layer[str(layer)]


def named_layers(model: Any) -> list[tuple[str, Any]]:
    """The mixture layers of a model by name."""
    return unique_names(mixture_layers(model))


def sizes_of(model: Any) -> dict[str, int]:
    """How many experts each mixture layer of a model has."""
    return {name: layer.num_experts for name, layer in named_layers(model)}


def takers_of(record: dict[str, Any], num_experts: int) -> Any:
    """Which experts of a sparse layer take a token, bool `(..., E)`: none that dropped it."""
    chosen = record["experts"][..., None] == np.arange(num_experts)
    return (chosen & record["kept"][..., None]).any(axis=-2)


def weights_of(record: dict[str, Any], num_experts: int) -> Any:
    """What tokens take of each expert, `(..., E)`, 0 where it was not chosen or had no room.

    Of a soft layer, the combine weights of the expert's slots together.
    """
    if "combine" in record:
        return np.nan_to_num(record["combine"].astype(np.float64)).sum(axis=-1)
    # Before the product: a NaN counts for none of the experts, and 0 * NaN for all.
    weights = np.nan_to_num(record["weights"].astype(np.float64)) * record["kept"]
    chosen = record["experts"][..., None] == np.arange(num_experts)
    return (chosen * weights[..., None]).sum(axis=-2)


def expert_weights(model: Any, x: Any, layer: str | None, batch_size: int) -> tuple[str, Any]:
    """A sparse or soft layer's name, and `weights_of` what it decides about `x`."""
    found = records_of(model, x, batch_size, SPARSE, SOFT)
    kind = "a layer that sends tokens to experts, or a `SoftMoE`"
    name, record = one_layer(found, layer, kind)
    return name, weights_of(record, sizes_of(model)[name])


def used_by_example(record: dict[str, Any], num_experts: int) -> Any:
    """How much each example uses each expert, `(n, E)`.

    That is how many of its tokens an expert gets; of a soft layer and of gates, the weight that
    its tokens, or its tasks, give it.
    """
    if "experts" in record:
        used = takers_of(record, num_experts)
    elif "combine" in record:
        used = weights_of(record, num_experts)
    else:
        used = np.nan_to_num(record["weights"])
    return used.reshape(len(used), -1, num_experts).sum(axis=1, dtype=np.float64)


def _has(record: Any, fields: tuple[str, ...]) -> bool:
    return all(hasattr(record, field) for field in fields)
