"""Figures of merit, and what the difference between two models says."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from common.seeds import paired_interval

from movielens.features import Examples


def roc_auc(label: np.ndarray, score: np.ndarray) -> float:
    """Return the chance that a positive is scored above a negative, ties counting one half."""
    label = np.asarray(label) > 0
    positives, negatives = int(label.sum()), int((~label).sum())
    if not positives or not negatives:
        return float("nan")
    _, place, count = np.unique(score, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(count) - (count - 1) / 2
    return float(
        (mean_rank[place[label]].sum() - positives * (positives + 1) / 2) / (positives * negatives)
    )


def root_mean_square(error: np.ndarray) -> float:
    """Return the square root of the mean squared error."""
    return float(np.sqrt(np.mean(np.square(error))))


def measure(
    examples: Examples, engagement: np.ndarray, liked: np.ndarray, rating: np.ndarray
) -> dict[str, float]:
    """Return AUC of engagement over all candidates; AUC of liked and RMSE over watched movies."""
    candidates = examples.in_catalogue.astype(bool)
    watched = examples.watched > 0
    return {
        "engagement": roc_auc(examples.watched[candidates], engagement[candidates]),
        "liked": roc_auc(examples.liked[watched], liked[watched]),
        "rating": root_mean_square(rating[watched] - examples.rating[watched]),
    }


@dataclass(frozen=True)
class Figure:
    """How one task is measured and called."""

    task: str
    title: str
    higher_is_better: bool


FIGURES = (
    Figure("engagement", "Engagement AUC", True),
    Figure("liked", "Liked AUC", True),
    Figure("rating", "Rating RMSE", False),
)


def compare(figure: Figure, mmoe: list[float], shared_bottom: list[float]) -> str:
    """Return a sentence on who wins one task, as far as the paired seeds can tell."""
    mean, half_width = paired_interval(mmoe, shared_bottom)
    seeds = len(mmoe)
    if seeds < 2:
        return f"{figure.title}: MMoE {mean:+.4f}; one seed cannot tell whether that is chance."
    numbers = f"{mean:+.4f} ± {half_width:.4f}, 95 % interval over {seeds} paired seeds"
    if abs(mean) <= half_width:
        return (
            f"{figure.title}: no difference between MMoE and shared bottom that {seeds} seeds can "
            f"show (MMoE {numbers})."
        )
    verdict = "better" if (mean > 0) == figure.higher_is_better else "worse"
    return f"{figure.title}: MMoE is {verdict} than shared bottom (MMoE {numbers})."
