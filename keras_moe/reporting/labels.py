"""Classes of the examples, at most as many as a picture holds."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_moe.core import checks
from keras_moe.core.types import Array, Data

_MOST = 40  # rows of a picture


class Labels(NamedTuple):
    """Classes of the examples.

    Attributes:
        codes: `(n,)`, the place of an example's label in `names`; one past it for a rare one.
        names: the labels, in order; where there are more than fit, the most frequent.
    """

    codes: Array
    names: list[str]


def labels_of(
    labels: Sequence[int] | Sequence[str] | Array | None,
    targets: Data,
    count: int,
    class_names: Sequence[str] | None,
) -> Labels | None:
    """The labels passed in, or integer targets, one per example; None where there are none.

    Raises:
        ValueError: where labels that were given are not one per example.
    """
    if labels is None:
        labels = _integers(targets, count)
        if labels is None:
            return None
    labels = np.asarray(labels)
    if labels.size < count or labels.size != len(labels):
        checks.fail(
            f"`labels` must have one entry for each of {count} examples.", shape=labels.shape
        )
    labels = labels.reshape(-1)[:count]
    known, codes, counts = np.unique(labels, return_inverse=True, return_counts=True)
    most = np.sort(np.argsort(-counts, kind="stable")[:_MOST])
    place = np.full(len(known), len(most))
    place[most] = np.arange(len(most))
    return Labels(place[codes], [_name(known[index], class_names) for index in most])


def _integers(targets: Data, count: int) -> Array | None:
    is_array = isinstance(targets, np.ndarray) and np.issubdtype(targets.dtype, np.integer)
    return targets if is_array and targets.size == count else None


def _name(label: Any, class_names: Sequence[str] | None) -> str:
    is_place = class_names is not None and np.issubdtype(np.asarray(label).dtype, np.integer)
    if is_place and 0 <= label < len(class_names or ()):
        return str((class_names or ())[label])
    return str(label)
