"""Examples from any data that `fit` takes."""

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import keras
import numpy as np

from keras_moe.core import checks
from keras_moe.core.types import Data
from keras_moe.inspection.records import example_count


def gather(data: Data, max_examples: int) -> tuple[Data, Data]:
    """The first examples of some data.

    Args:
        data: An array, a dict or list of arrays, a tuple (x, y) or (x, y, sample_weight), or what
            gives batches of these: a `keras.utils.PyDataset`, a `tf.data.Dataset`, a data loader.
        max_examples: How many to read at most.

    Returns:
        The inputs as NumPy arrays, in their structure, and the targets, None where there are none.

    Raises:
        ValueError: where there is no example.
    """
    batches: list[tuple[Any, Any]] = []
    total = 0
    for batch in _batches(data):
        x, y, _ = keras.utils.unpack_x_y_sample_weight(batch)
        batches.append(keras.tree.map_structure(np.asarray, (x, y), none_is_leaf=False))
        total += example_count(batches[-1][0])
        if total >= max_examples:
            break
    if not total:
        checks.fail("`data` must have at least one example.", data=type(data).__name__)
    x, y = keras.tree.map_structure(
        lambda *parts: np.concatenate(parts)[:max_examples], *batches, none_is_leaf=False
    )
    return x, y


def _batches(data: Data) -> Iterator[Any]:
    """One batch of all where the data are arrays, else the batches that they give."""
    if hasattr(data, "num_batches") and hasattr(data, "__getitem__"):  # a PyDataset
        count = data.num_batches
        numbers = itertools.count() if count is None else range(count)
        return (data[number] for number in numbers)
    if isinstance(data, tuple):
        return iter([data])
    is_tensor = hasattr(data, "shape") and hasattr(data, "dtype")
    if is_tensor or isinstance(data, dict | list):  # a list of inputs; of a loader it is a tuple
        return iter([(data,)])
    if not isinstance(data, Iterable):
        checks.fail("`data` must be arrays or give batches of them.", data=type(data).__name__)
    return iter(data)
