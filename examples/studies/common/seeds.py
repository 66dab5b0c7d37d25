"""What a few seeds say about the difference between two models."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Two-sided 95 % points of Student's t for 1, 2, 3, ... degrees of freedom.
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def paired_interval(first: Sequence[float], second: Sequence[float]) -> tuple[float, float]:
    """Return the mean of first - second over seeds and the half width of its 95 % interval."""
    difference = np.subtract(first, second)
    seeds = len(difference)
    if seeds < 2:
        return float(difference.mean()), float("inf")
    t = _T_95[min(seeds - 2, len(_T_95) - 1)]
    return float(difference.mean()), float(t * difference.std(ddof=1) / np.sqrt(seeds))


def mean_and_spread(values: Sequence[float]) -> str:
    """Return the mean and, of two and more, their standard deviation, as text."""
    spread = f" ± {np.std(values, ddof=1):.4f}" if len(values) > 1 else ""
    return f"{np.mean(values):.4f}{spread}"


def verdict(
    title: str,
    values: Sequence[float],
    other_title: str,
    others: Sequence[float],
    higher_is_better: bool = True,
) -> str:
    """Return a sentence on which model wins, as far as the paired seeds can tell."""
    mean, half_width = paired_interval(values, others)
    seeds = len(values)
    if seeds < 2:
        return f"{title} - {other_title}: {mean:+.4f}. One seed cannot tell if that is chance."
    numbers = f"{mean:+.4f} ± {half_width:.4f}, 95 % interval over {seeds} paired seeds"
    if abs(mean) <= half_width:
        return f"No difference that {seeds} seeds can show: {title} - {other_title} {numbers}."
    word = "better" if (mean > 0) == higher_is_better else "worse"
    return f"{title} is {word} than {other_title}: {numbers}."
