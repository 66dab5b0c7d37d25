"""The records that dispatch is made of, and how they are read: bins, slots, layers of experts."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import keras
from keras import ops

from keras_moe.core.exporting import is_exporting
from keras_moe.core.types import Tensor


class Bins(NamedTuple):
    """Assignments sorted by bin.

    Attributes:
        order: int32 `(A,)`, assignments in bin order, unassigned ones last.
        rank: int32 `(A,)`, where each assignment stands in `order`.
        edges: int32 `(bins + 1,)`, where each bin begins in `order`, and where the last one ends.
        bin_of: int32 `(A,)`, the bin of each assignment, `bins` if it has none.
    """

    order: Tensor
    rank: Tensor
    edges: Tensor
    bin_of: Tensor

    @property
    def starts(self) -> Tensor:
        """int32 `(bins,)`, where each bin begins in `order`."""
        return self.edges[:-1]

    @property
    def ends(self) -> Tensor:
        """int32 `(bins,)`, where each bin ends in `order`."""
        return self.edges[1:]

    @property
    def counts(self) -> Tensor:
        """int32 `(bins,)`, how many assignments each bin holds."""
        return self.edges[1:] - self.edges[:-1]

    @property
    def position(self) -> Tensor:
        """int32 `(A,)`, the place of each assignment in its bin, from 0."""
        return self.rank - entries_at(self.edges, self.bin_of)


class Slots(NamedTuple):
    """A layout of bins in a flat array of S slots.

    Attributes:
        assignment: int32 `(S,)`, the assignment a slot holds; A if it is empty.
        slot_of: int32 `(A,)`, the slot of an assignment; S if it was dropped.
    """

    assignment: Tensor
    slot_of: Tensor


class Stage(NamedTuple):
    """One layer of every expert: rows -> activation(rows @ kernel + bias, ...) * scale.

    Under a mixed precision a walk gets the variables as they are, and casts those of an expert that
    has rows: few tokens read the weights of few experts.

    Attributes:
        kernels: `(E, in, out)` each: one, or two where the activation takes two (gate and value).
        biases: `(E, out)` for each kernel, or an empty tuple.
        activation: elementwise, of as many `(rows, out)` as there are kernels; None for linear.
        scale: dropout's factors `(S, out)`, one for each row, or None.
    """

    kernels: tuple[Tensor, ...]
    biases: tuple[Tensor, ...]
    activation: Callable[..., Tensor] | None
    scale: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Rows:
    """Assignments sorted by expert, which a bank applies its experts to: data, and no function.

    Not a tuple: Keras would cast the weights of one to the layer's dtype.

    Args:
        weights: float32 `(N, k)`, the weight of each assignment.
        slots: assignments sorted by expert, those without an expert, or dropped, last.
        ends: int32 `(E,)`, where each expert's slots end; the first one's begin at 0.
        is_grouped: whether the platform's grouped matmul is taken, and no walk.
            Defaults to `False`.
    """

    weights: Tensor
    slots: Slots
    ends: Tensor
    is_grouped: bool = False


def entries_at(values: Tensor, places: Tensor) -> Tensor:
    """The entries of an array at some places."""
    if not is_exporting():
        return ops.take(values, places)
    # Rows of one column: PyTorch's ONNX and OpenVINO take a lookup for nothing else.
    rows = ops.take(ops.expand_dims(values, -1), ops.reshape(places, (-1,)), axis=0)
    return ops.reshape(rows, ops.shape(places))


def slots_by_choice(slots: Slots, top_k: int) -> tuple[Tensor, Tensor]:
    """The slot of each choice of each token, `(k, N)`, 0 for none, and whether it has one."""
    by_choice = ops.reshape(slots.slot_of, (top_k, -1))
    is_kept = by_choice < ops.shape(slots.assignment)[0]
    return ops.where(is_kept, by_choice, 0), is_kept


def rows_by_choice(rows: Tensor, source: Tensor, is_kept: Tensor) -> list[Tensor]:
    """The rows `(N, out)` of every first choice, every second one and so on; 0 where none is kept.

    One by one: a single gather of all choices, `(k, N, out)`, takes XLA:CPU ten times as long.
    """
    top_k = is_kept.shape[0]
    return [
        ops.cast(ops.where(kept[:, None], take_rows(rows, chosen), 0), wide_dtype(rows))
        for kept, chosen in zip(
            ops.unstack(is_kept, top_k), ops.unstack(source, top_k), strict=True
        )
    ]


def take_rows(rows: Tensor, indices: Tensor) -> Tensor:
    """Rows by index; where there may be none at all, a row to take is put there."""
    if not isinstance(ops.shape(rows)[0], int):
        rows = ops.concatenate([rows, ops.zeros((1, rows.shape[-1]), dtype=rows.dtype)], axis=0)
    return ops.take(rows, indices, axis=0)


def wide_dtype(rows: Tensor) -> str:
    """The dtype that sums are taken in: float32 at least."""
    return keras.backend.result_type(keras.backend.standardize_dtype(rows.dtype), "float32")
