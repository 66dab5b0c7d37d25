"""The two rankers of the movie study, by `models.multitask_ranker`: shared bottom, and MMoE.

Nothing here knows of tensorflow-recommenders; `movies.py` puts these models in one.
"""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from keras_moe.models import features, multitask_ranker
from movielens.features import RECENT

TASKS = {"engagement": "binary", "liked": "binary", "rating": "regression"}
MIDDLE_RATING = 3.5  # stars, where the rating tower starts
SETTINGS = {  # found on the validation ratings
    "shared_units": 64,
    "num_experts": 4,
    "expert_units": 32,
    "tower_units": 16,
    "dropout": 0.2,
    "embedding_l2": 1e-4,
}
YEARS = 30  # spans of five years, and one row for movies without a year


def movie_features(
    *,
    num_users: int,
    num_movie_rows: int,
    num_genres: int,
    scalar_mean: np.ndarray,
    scalar_variance: np.ndarray,
) -> list[features.Feature]:
    """Describe what `Past.features` returns; row 0 of the movies is padding."""
    return [
        features.Categorical("user", num_users, dim=8),
        features.Categorical("movie", num_movie_rows, dim=8),
        features.History("recent", RECENT, of="movie"),
        features.History("recent_liked", RECENT, of="movie"),
        features.Categorical("year", YEARS, dim=4, regularized=False),
        features.MultiHot("genres", num_genres, dim=8),
        features.Numeric("genre_share", num_genres),
        features.Numeric("genre_liking", num_genres),
        features.Numeric("scalars", len(scalar_mean), scalar_mean, scalar_variance),
    ]


def build_ranker(
    trunk: str, described: list[features.Feature], *, seed: int = 0, **settings: Any
) -> keras.Model:
    """Build a ranker.

    Args:
        trunk: `"mmoe"` for experts mixed by one gate per task, `"shared_bottom"` for one wider
            hidden layer that all towers read.
        described: What `movie_features` returns.
        seed: Seed of the initial weights and of dropout. Defaults to 0.
        **settings: Arguments of `multitask_ranker` that replace or add to `SETTINGS`.

    Returns:
        A model from a dict of features to a dict of (batch, 1) predictions, one per task.
    """
    return multitask_ranker(
        described,
        TASKS,
        trunk=trunk,
        interactions=[("user", "movie"), ("recent", "movie"), ("recent_liked", "movie")],
        initial_predictions={"rating": MIDDLE_RATING},
        seed=seed,
        **{**SETTINGS, **settings},
    )


def count_dense_parameters(model: keras.Model) -> int:
    """Count trainable parameters outside the embeddings, which both models share."""
    tables = keras.layers.Embedding, keras.layers.Normalization
    return sum(layer.count_params() for layer in model.layers if not isinstance(layer, tables))
