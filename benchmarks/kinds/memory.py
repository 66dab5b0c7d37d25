"""The memory that a training step takes beyond the weights and their gradients."""

from __future__ import annotations

import dataclasses

from benchmarks.contender import Case, Options
from benchmarks.kinds import feed_forward
from benchmarks.rows import GRADIENT, Row


def case(row: Row, options: Options) -> Case:
    """The contenders of a feed-forward row; peers and the forward pass are left out."""
    whole = feed_forward.case(row, dataclasses.replace(options, peers=False))
    return dataclasses.replace(whole, passes=(GRADIENT,))
