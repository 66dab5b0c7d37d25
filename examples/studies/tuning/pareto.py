"""Which models are worth their cost."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def pareto_front(
    costs: Sequence[float], scores: Sequence[float], higher_is_better: bool = True
) -> list[int]:
    """Return the indices of the points that no other point dominates, from cheap to dear.

    A point dominates another if it is at least as cheap and at least as good, and not equal in
    both. Equal points stay together; a score that is not finite is never on the front.
    """
    costs, scores = np.asarray(costs, float), np.asarray(scores, float)
    gains = scores if higher_is_better else -scores
    finite = np.flatnonzero(np.isfinite(gains) & np.isfinite(costs))
    front: list[int] = []
    for index in finite[np.lexsort((-gains[finite], costs[finite]))]:
        last = front[-1] if front else None
        is_equal = last is not None and (costs[index], gains[index]) == (costs[last], gains[last])
        if last is None or is_equal or gains[index] > gains[last]:
            front.append(int(index))
    return front
