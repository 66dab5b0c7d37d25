"""Statistics of paired samples.

Two functions that take turns on a machine see the same disturbances, so the ratio is taken within
each round, and the median over rounds is what is reported: it holds where single times do not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Summary(NamedTuple):
    """Median and quartiles of n samples."""

    median: float
    lower_quartile: float
    upper_quartile: float
    n: int


def summarize(samples: Sequence[float]) -> Summary:
    """The summary of some samples.

    Raises:
        ValueError: on no samples, or on one that is no positive number.
    """
    if not samples:
        raise ValueError("There are no samples to summarize.")
    if not all(math.isfinite(sample) and sample > 0 for sample in samples):
        raise ValueError(f"Samples must be positive and finite. Received: {list(samples)}")
    lower, median, upper = np.percentile(samples, (25, 50, 75))
    return Summary(float(median), float(lower), float(upper), len(samples))


def paired_ratio(subject: Sequence[float | None], against: Sequence[float | None]) -> Summary:
    """The summary of `subject / against` over the rounds in which both took part.

    Args:
        subject: a sample per round; None where it sat out.
        against: the same of what it is compared with.
    """
    rounds = zip(subject, against, strict=True)
    return summarize([s / a for s, a in rounds if s is not None and a is not None])
