"""Contenders in a measurement, and the comparisons between them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

OURS = "keras_moe"
DENSE = "dense"
OURS_GLU = "keras_moe glu"
DENSE_GLU = "dense glu"


def _no_losses(result: Any) -> list[Any]:
    del result
    return []


@dataclasses.dataclass(frozen=True)
class Contender:
    """A layer with the inputs it is timed on.

    Attributes:
        name: what the table calls it.
        make: makes and builds the layer: a Keras layer, or a torch module on the torch backend.
            Called late, so that one that fails is left out and the others go on.
        inputs: the array it is called with.
        losses_of: the auxiliary losses in what a torch module returns; a Keras layer has `losses`.
        peak_bytes: what it is known to hold at once, to leave it out where memory is short.
    """

    name: str
    make: Callable[[], Any]
    inputs: np.ndarray
    losses_of: Callable[[Any], list[Any]] = _no_losses
    peak_bytes: int = 0


class Comparison(NamedTuple):
    """The time, or another measure, of `subject` over that of `against`."""

    subject: str
    against: str
    limits: Mapping[str, float] = {}


@dataclasses.dataclass(frozen=True)
class Case:
    """Contenders and comparisons of one row, measured in one process.

    Attributes:
        contenders: in the order in which they take turns.
        comparisons: the ratios to report.
        passes: "forward" and "gradient", or one of them.
        facts: what else a reader should know, stored as it is.
    """

    contenders: Sequence[Contender]
    comparisons: Sequence[Comparison]
    passes: Sequence[str]
    facts: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a run.

    Attributes:
        backend: as `--backend` names it.
        dispatchers: values of `MoE(dispatch=)`.
        peers: whether other libraries' layers take part.
        repeats: rounds of a timing.
        seconds: about the most that one contender may take in one timing.
        row_limit: seconds after which a row is given up.
        quick: whether sizes are tiny.
    """

    backend: str
    dispatchers: Sequence[str] = ("auto",)
    peers: bool = True
    repeats: int = 15
    seconds: float = 20.0
    row_limit: int = 1800
    quick: bool = False

    @property
    def keras_backend(self) -> str:
        """The backend as Keras names it."""
        return self.backend.partition("-")[0]
