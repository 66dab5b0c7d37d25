"""What the layers of a model decide about data, as arrays for a picture."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import keras
import numpy as np
from keras import ops

from keras_moe.core import checks
from keras_moe.core.types import Array, Data, Tensor
from keras_moe.inspection.mixtures import named_layers, one_layer
from keras_moe.inspection.recording import record_routing

# What is read of a layer that sends tokens to experts, and of one that mixes them into slots.
SPARSE = ("experts", "weights", "kept")
SOFT = ("combine",)
# And of the gates of tasks, whose weights are for every expert.
GATES = ("weights",)


class Record(NamedTuple):
    """What a layer decides about some data, in one of its calls.

    Attributes:
        layer: the layer.
        fields: arrays by field of its routing record, batches joined.
    """

    layer: keras.layers.Layer
    fields: dict[str, Array]


def records_of(
    model: keras.layers.Layer, x: Data, batch_size: int, *kinds: tuple[str, ...]
) -> dict[str, Record]:
    """What the mixture layers decide about `x`, batches joined.

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
    parts: dict[tuple[str, int], list[dict[str, Array]]] = {}
    for batch in _batches(x, batch_size):
        with record_routing(model) as records:
            model(batch, training=False)
        for name, calls in records.items():
            for number, record in enumerate(calls, start=1):
                fields = next((kind for kind in kinds if _has(record, kind)), None)
                if fields is not None:
                    found = {field: getattr(record, field) for field in fields}
                    parts.setdefault((name, number), []).append(found)
    several = {name for name, number in parts if number > 1}
    return {
        f"{name} (call {number})" if name in several else name: Record(
            layers[name],
            {field: np.concatenate([each[field] for each in found]) for field in found[0]},
        )
        for (name, number), found in parts.items()
    }


def _batches(x: Data, batch_size: int) -> Iterator[Data]:
    checks.positive_int("batch_size", batch_size)
    arrays = _arrays(x)
    if not all(len(getattr(each, "shape", ())) for each in arrays):
        checks.fail(
            "`x` must be an array, or a dict or list of arrays.",
            types=sorted({type(each).__name__ for each in arrays}),
        )
    counts = {len(each) for each in arrays}
    if len(counts) != 1 or 0 in counts:
        checks.fail(
            "`x` must have at least one example, and as many in each array.",
            shapes=[tuple(each.shape) for each in arrays],
        )
    x = keras.tree.map_structure(
        lambda each: each if ops.is_tensor(each) else np.asarray(each), x, none_is_leaf=False
    )
    for start in range(0, counts.pop(), batch_size):
        yield examples_at(x, slice(start, start + batch_size))


def _arrays(x: Data) -> list[Tensor]:
    """The inputs one by one, but for optional ones that are not given."""
    return [each for each in keras.tree.flatten(x) if each is not None]


def example_count(x: Data) -> int:
    """How many examples the inputs are."""
    return len(next(iter(_arrays(x)), ()))


def examples_at(x: Data, places: slice | Sequence[int] | Array) -> Data:
    """Some of the examples, by a slice or their places."""
    return keras.tree.map_structure(lambda each: each[places], x, none_is_leaf=False)


def is_by_example(record: Record, count: int) -> bool:
    """Whether the first axis of what a layer decides is that of the examples."""
    return all(len(each) == count for each in record.fields.values())


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


def takers_of(record: Record) -> Array:
    """Which experts of a sparse layer take a token, bool `(..., E)`: none that dropped it."""
    chosen = record.fields["experts"][..., None] == np.arange(record.layer.num_experts)
    return (chosen & record.fields["kept"][..., None]).any(axis=-2)


def weights_of(record: Record) -> Array:
    """What tokens take of each expert, `(..., E)`, 0 where it was not chosen or had no room.

    Of a soft layer, the combine weights of the expert's slots together.
    """
    fields = record.fields
    if "combine" in fields:
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
    """How much each example uses each expert, `(n, E)`.

    That is how many of its tokens an expert gets; of a soft layer and of gates, the weight that
    its tokens, or its tasks, give it.
    """
    if "experts" in record.fields:
        used = takers_of(record)
    elif "combine" in record.fields:
        used = weights_of(record)
    else:
        used = np.nan_to_num(record.fields["weights"])
    return used.reshape(len(used), -1, used.shape[-1]).sum(axis=1, dtype=np.float64)


def _has(record: object, fields: tuple[str, ...]) -> bool:
    return all(hasattr(record, field) for field in fields)
