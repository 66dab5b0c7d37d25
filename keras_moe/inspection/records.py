"""Decisions of a model's layers about data, as arrays for pictures."""

from collections.abc import Iterator, Sequence
from inspect import signature
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_moe.core import checks
from keras_moe.core.types import Array, Data, Tensor
from keras_moe.inspection.mixtures import is_of_keras_3, named_layers, one_layer
from keras_moe.inspection.recording import record_routing

# The fields that are read from sparse layers, and from layers that mix tokens into slots.
SPARSE = ("experts", "weights", "kept", "asked")
SOFT = ("combine",)
# The field of such layers that says what each slot is made of.
SLOTS = ("dispatch",)
# The field of gates of tasks, whose weights are for every expert.
GATES = ("weights",)


class Record(NamedTuple):
    """Decisions of a layer about some data, in one of its calls.

    Attributes:
        layer: the layer.
        fields: arrays by field of its routing record, batches joined.
    """

    layer: keras.layers.Layer
    fields: dict[str, Array]


def records_of(
    model: keras.layers.Layer, x: Data, batch_size: int, *kinds: tuple[str, ...]
) -> dict[str, Record]:
    """Returns what the mixture layers decide about `x`, with batches joined.

    Args:
        model: A built model.
        x: Its inputs, an array or a structure of arrays.
        batch_size: Examples per call of the model.
        *kinds: The fields to keep of a record: of the first kind whose fields it has all.

    Returns:
        Records by layer name, of the layers whose records are of a kind. A layer that the model
        calls several times has one per call, "moe (call 1)" and so on.
    """
    layers = dict(named_layers(model))
    # Keras 2 hands `training` on to models that do not take it.
    takes_training = is_of_keras_3(model) or "training" in signature(model.call).parameters
    inference = {"training": False} if takes_training else {}
    parts: dict[tuple[str, int], list[dict[str, Array]]] = {}
    for batch in _batches(x, batch_size):
        with record_routing(model) as records:
            model(batch, **inference)
        for name, calls in records.items():
            for number, record in enumerate(calls, start=1):
                fields = next((kind for kind in kinds if _has(record, kind)), None)
                if fields is not None:
                    arrays = {field: getattr(record, field) for field in fields}
                    parts.setdefault((name, number), []).append(arrays)
    several = {name for name, number in parts if number > 1}
    return {
        f"{name} (call {number})" if name in several else name: Record(
            layers[name],
            {field: np.concatenate([part[field] for part in batches]) for field in batches[0]},
        )
        for (name, number), batches in parts.items()
    }


def _batches(x: Data, batch_size: int) -> Iterator[Data]:
    checks.positive_int("batch_size", batch_size)
    arrays = _arrays(x)
    if not all(len(getattr(array, "shape", ())) for array in arrays):
        checks.fail(
            "`x` must be an array, or a dict or list of arrays.",
            types=sorted({type(array).__name__ for array in arrays}),
        )
    counts = {len(array) for array in arrays}
    if len(counts) != 1 or 0 in counts:
        checks.fail(
            "`x` must have at least one example, and as many in each array.",
            shapes=[tuple(array.shape) for array in arrays],
        )
    x = keras.tree.map_structure(
        lambda leaf: leaf if ops.is_tensor(leaf) else np.asarray(leaf), x, none_is_leaf=False
    )
    for start in range(0, counts.pop(), batch_size):
        yield examples_at(x, slice(start, start + batch_size))


def _arrays(x: Data) -> list[Tensor]:
    """The inputs in a list, without optional ones that are None."""
    return [array for array in keras.tree.flatten(x) if array is not None]


def example_count(x: Data) -> int:
    """The number of examples in the inputs."""
    return len(next(iter(_arrays(x)), ()))


def examples_at(x: Data, places: slice | Sequence[int] | Array) -> Data:
    """Some of the examples, by a slice or their places."""
    return keras.tree.map_structure(lambda array: array[places], x, none_is_leaf=False)


def is_by_example(record: Record, count: int) -> bool:
    """Whether the first axis of what a layer decides is that of the examples."""
    return all(len(array) == count for array in record.fields.values())


def check_by_example(name: str, record: Record, x: Data) -> None:
    """Fails where a layer decides about something else than examples or their tokens."""
    count = example_count(x)
    if not is_by_example(record, count):
        checks.fail(
            f"`layer` must name one whose inputs have the {count} examples of `x` on their first "
            "axis.",
            layer=name,
            length=len(next(iter(record.fields.values()))),
        )


def is_soft(record: Record) -> bool:
    """Whether each token takes of all experts, by weights."""
    return "combine" in record.fields


def is_padding(record: Record) -> Array:
    """Marks the tokens of a sparse or soft layer that ask for no expert, bool `(...)`."""
    if is_soft(record):
        return np.asarray(weights_of(record).max(axis=-1) <= 0)
    return np.asarray(~record.fields["asked"].any(axis=-1))


def takers_of(record: Record) -> Array:
    """Marks the experts of a sparse layer that process a token, bool `(..., E)`, without drops."""
    chosen = record.fields["experts"][..., None] == np.arange(record.layer.num_experts)
    return (chosen & record.fields["kept"][..., None]).any(axis=-2)


def weights_of(record: Record) -> Array:
    """The weight of each expert in a token, `(..., E)`, 0 where it was not chosen or had no room.

    In a soft layer that is the sum of the combine weights of the expert's slots.
    """
    fields = record.fields
    if is_soft(record):
        return np.nan_to_num(fields["combine"].astype(np.float64)).sum(axis=-1)
    # Before the product: a NaN counts for none of the experts, and 0 * NaN for all.
    weights = np.nan_to_num(fields["weights"].astype(np.float64)) * fields["kept"]
    chosen = fields["experts"][..., None] == np.arange(record.layer.num_experts)
    return (chosen * weights[..., None]).sum(axis=-2)


def expert_weights(
    model: keras.layers.Layer, x: Data, layer: str | None, batch_size: int
) -> tuple[str, Record]:
    """The record of a sparse or soft layer, and its name."""
    kind = "a layer that sends tokens to experts, or a `SoftMoE`"
    return one_layer(model, records_of(model, x, batch_size, SPARSE, SOFT), layer, kind)


def used_by_example(record: Record) -> Array:
    """The use of each expert by each example, `(n, E)`.

    In a sparse layer that is the number of its tokens that an expert gets. In a soft layer and in
    gates it is the weight that its tokens, or its tasks, give to an expert.
    """
    if "experts" in record.fields:
        used = takers_of(record)
    elif is_soft(record):
        used = weights_of(record)
    else:
        used = np.nan_to_num(record.fields["weights"])
    return used.reshape(len(used), -1, used.shape[-1]).sum(axis=1, dtype=np.float64)


def _has(record: object, fields: tuple[str, ...]) -> bool:
    return all(hasattr(record, field) for field in fields)
