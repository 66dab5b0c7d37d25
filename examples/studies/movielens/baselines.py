"""What can be predicted without a neural network."""

from __future__ import annotations

import itertools

import numpy as np

from movielens.data import TRAIN, VALIDATION
from movielens.features import Examples, Past
from movielens.figures import measure, roc_auc, root_mean_square


class BiasModel:
    """Predict mean + movie bias + user bias, the user's taken from strictly earlier ratings.

    The shrinkage of both biases, and how many of the user's last ratings to average, are chosen on
    the validation ratings. The movie biases come from all training ratings, also later ones of
    other users: a little more than the networks' features hold.
    """

    def __init__(self, past: Past):
        self.past = past
        validation = past.ratings(VALIDATION)
        shrinkages, everything = (1, 2, 4, 8, 16), len(past.data)
        grid = itertools.product(shrinkages, shrinkages, (5, 10, 20, 40, everything))

        def error(choice: tuple[int, int, int]) -> float:
            self._fit(*choice)
            return root_mean_square(self(validation) - validation.rating)

        self.choice = min(grid, key=error)
        self._fit(*self.choice)

    def _fit(self, movie_shrink: int, user_shrink: int, last: int) -> None:
        data, training = self.past.data, self.past.period == TRAIN
        self.mean = data.rating[training].mean()
        movie, above = data.movie[training], data.rating[training] - self.mean
        count = np.bincount(movie, minlength=data.num_movies)
        total = np.bincount(movie, above, minlength=data.num_movies)
        self.movie_bias = total / (count + movie_shrink)
        rest = data.rating - self.mean - self.movie_bias[data.movie]
        self._rest_before = np.concatenate([[0.0], np.cumsum(rest)])
        self._user_shrink, self._last = user_shrink, last

    def __call__(self, examples: Examples) -> np.ndarray:
        """Return predicted ratings in stars."""
        past = examples.past
        begin = np.maximum(past - self._last, self.past.start[examples.user])
        rest = self._rest_before[past] - self._rest_before[begin]
        user_bias = rest / (past - begin + self._user_shrink)
        return np.clip(self.mean + self.movie_bias[examples.movie] + user_bias, 0.5, 5.0)


def measure_baselines(
    past: Past, validation: Examples, test: Examples
) -> dict[str, dict[str, float]]:
    """Return test figures of popularity (engagement) and of the bias model (liked, rating)."""

    def popularity_auc(examples: Examples, which: str) -> float:
        rows = examples[np.flatnonzero(examples.in_catalogue)]
        return roc_auc(rows.watched, past.popularity(rows)[which])

    best = max(("ever", "last year"), key=lambda which: popularity_auc(validation, which))
    bias = BiasModel(past)(test)
    figures = measure(test, bias, bias, bias)
    return {
        f"popularity, {best}": {"engagement": popularity_auc(test, best)},
        "user and movie bias": {"liked": figures["liked"], "rating": figures["rating"]},
    }
