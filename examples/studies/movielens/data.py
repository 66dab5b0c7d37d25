"""Read a MovieLens folder and split every user's ratings by time."""

from __future__ import annotations

import csv
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np

ACKNOWLEDGEMENT = (
    "F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context. "
    "ACM Transactions on Interactive Intelligent Systems (TiiS) 5, 4: 19:1-19:19. "
    "https://doi.org/10.1145/2827872"
)
LIKED_FROM = 4.0  # stars
TRAIN, VALIDATION, TEST = 0, 1, 2
PERIOD_NAMES = ("train", "validation", "test")

_EXPECTED = (
    "Expected a folder with ratings.csv and movies.csv (ml-latest, ml-25m, ml-32m) "
    "or ratings.dat and movies.dat (ml-1m, ml-10m)."
)
_RATINGS_HEADER = ["userId", "movieId", "rating", "timestamp"]
_MOVIES_HEADER = ["movieId", "title", "genres"]
_NO_GENRES = "(no genres listed)"
_YEAR_IN_TITLE = re.compile(r"\((\d{4})(?:[-\u2013]\d{0,4})?\)\s*$")


class DataError(Exception):
    """The data given with --data cannot be used; the message says why in one line."""


@dataclass(frozen=True)
class MovieLens:
    """Ratings sorted by user, then time, then movie; users and movies as indices from 0."""

    user: np.ndarray  # (ratings,) index into user_ids
    movie: np.ndarray  # (ratings,) index into movie_ids
    rating: np.ndarray  # (ratings,) stars, 0.5 to 5
    timestamp: np.ndarray  # (ratings,) seconds since 1970, UTC
    user_ids: np.ndarray
    movie_ids: np.ndarray
    titles: list[str]
    release_year: np.ndarray  # (movies,) 0 where the title has no year
    genre_names: list[str]
    movie_genres: np.ndarray  # (movies, genres) 0 or 1

    @property
    def num_users(self) -> int:
        return len(self.user_ids)

    @property
    def num_movies(self) -> int:
        return len(self.movie_ids)

    def __len__(self) -> int:
        return len(self.user)


def load_movielens(folder: str | Path, max_users: int | None = None, seed: int = 0) -> MovieLens:
    """Read a MovieLens folder, old (`.dat`) or new (`.csv`) format.

    Args:
        folder: The folder that holds the ratings and the movies.
        max_users: Keep this many users, drawn at random. Defaults to None, which keeps all.
        seed: Seed of that draw. Defaults to 0.

    Returns:
        The ratings as a `MovieLens` record.

    Raises:
        DataError: The folder is missing, incomplete, empty or not MovieLens.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"there is no folder {str(folder)!r}. {_EXPECTED}")
    if (folder / "ratings.csv").is_file() and (folder / "movies.csv").is_file():
        ratings = _read_ratings_csv(folder / "ratings.csv")
        movies = _read_movies_csv(folder / "movies.csv")
    elif (folder / "ratings.dat").is_file() and (folder / "movies.dat").is_file():
        ratings = _read_ratings_dat(folder / "ratings.dat")
        movies = _read_movies_dat(folder / "movies.dat")
    else:
        raise DataError(f"{str(folder)!r} does not hold the two files needed. {_EXPECTED}")
    if not len(ratings):
        raise DataError(f"the ratings in {str(folder)!r} are empty.")
    if not movies:
        raise DataError(f"the movies in {str(folder)!r} are empty.")
    if max_users is not None:
        ratings = _keep_users(ratings, max_users, seed)
    return _index(ratings, movies, folder)


def split_by_time(
    data: MovieLens, validation_share: float = 0.1, test_share: float = 0.2
) -> np.ndarray:
    """Give every rating a period: a user's first ratings train, the last ones test.

    Ratings of one user with the same timestamp are never separated: all of them go to the period
    of the first of them.

    Args:
        data: Ratings as `load_movielens` returns them.
        validation_share: Share of every user's ratings before the test ones. Defaults to 0.1.
        test_share: Share of every user's ratings, the latest. Defaults to 0.2.

    Returns:
        `(ratings,)` array of `TRAIN`, `VALIDATION` or `TEST`.
    """
    starts = user_starts(data)
    counts = np.diff(starts)
    position = first_of_moment(data) - starts[data.user]
    test_from = counts - np.floor(counts * test_share).astype(int)
    validation_from = counts - np.floor(counts * (validation_share + test_share)).astype(int)
    period = np.full(len(data), TRAIN)
    period[position >= validation_from[data.user]] = VALIDATION
    period[position >= test_from[data.user]] = TEST
    return period


def user_starts(data: MovieLens) -> np.ndarray:
    """Return `(users + 1,)`: where each user's ratings start, and at last how many there are."""
    return np.searchsorted(data.user, np.arange(data.num_users + 1))


def first_of_moment(data: MovieLens) -> np.ndarray:
    """Return, for every rating, the index of its user's first rating with the same timestamp.

    Everything of that user before this index is strictly earlier, nothing after it is.
    """
    index = np.arange(len(data))
    same = np.zeros(len(data), bool)
    same[1:] = (np.diff(data.user) == 0) & (np.diff(data.timestamp) == 0)
    return np.maximum.accumulate(np.where(same, 0, index))


def _read_ratings_csv(path: Path) -> np.ndarray:
    with path.open(encoding="utf-8", newline="") as file:
        header = next(csv.reader(file), [])
        if header[:4] != _RATINGS_HEADER:
            raise DataError(
                f"{path.name} must start with the columns {','.join(_RATINGS_HEADER)}. "
                f"Received: {','.join(header)[:80] or 'an empty file'}"
            )
        return _parse_ratings(file, ",", path)


def _read_ratings_dat(path: Path) -> np.ndarray:
    with path.open(encoding="latin-1") as file:
        return _parse_ratings((line.replace("::", ",") for line in file), ",", path)


def _parse_ratings(lines, delimiter: str, path: Path) -> np.ndarray:
    lines = list(lines)
    if not any(line.strip() for line in lines):
        return np.empty((0, 4))
    try:
        ratings = np.loadtxt(lines, delimiter=delimiter, usecols=(0, 1, 2, 3), ndmin=2)
    except (ValueError, IndexError) as error:
        reason = str(error).splitlines()[0]
        raise DataError(f"{path.name} has a row that is not a rating: {reason}") from error
    if ratings[:, 2].min() < 0 or ratings[:, 2].max() > 5:
        raise DataError(f"{path.name} has ratings outside 0 to 5 stars.")
    return ratings


def _read_movies_csv(path: Path) -> list[list[str]]:
    with path.open(encoding="utf-8", newline="") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        if header[:3] != _MOVIES_HEADER:
            raise DataError(
                f"{path.name} must start with the columns {','.join(_MOVIES_HEADER)}. "
                f"Received: {','.join(header)[:80] or 'an empty file'}"
            )
        return [row for row in reader if row]


def _read_movies_dat(path: Path) -> list[list[str]]:
    with path.open(encoding="latin-1") as file:
        return [line.rstrip("\n").split("::") for line in file if line.strip()]


def _keep_users(ratings: np.ndarray, max_users: int, seed: int) -> np.ndarray:
    users = np.unique(ratings[:, 0])
    if len(users) <= max_users:
        return ratings
    kept = np.random.default_rng(seed).choice(users, max_users, replace=False)
    return ratings[np.isin(ratings[:, 0], kept)]


def _index(ratings: np.ndarray, movies: list[list[str]], folder: Path) -> MovieLens:
    try:
        movie_ids = np.array([int(row[0]) for row in movies])
        titles = [row[1] for row in movies]
        genres_of = [row[2].split("|") for row in movies]
    except (ValueError, IndexError) as error:
        raise DataError(
            f"the movies in {str(folder)!r} have a row that is not id, title, genres: {error}"
        ) from error
    by_id = np.argsort(movie_ids, kind="stable")
    place = np.minimum(np.searchsorted(movie_ids[by_id], ratings[:, 1]), len(by_id) - 1)
    movie = by_id[place]
    unknown = movie_ids[movie] != ratings[:, 1]
    if unknown.any():
        raise DataError(
            f"{int(unknown.sum())} ratings in {str(folder)!r} are of movies that its movie file "
            f"does not have, the first of movie id {int(ratings[unknown][0, 1])}."
        )
    user_ids, user = np.unique(ratings[:, 0].astype(np.int64), return_inverse=True)
    timestamp = ratings[:, 3].astype(np.int64)
    order = np.lexsort((movie, timestamp, user))
    genre_names = sorted({name for names in genres_of for name in names} - {_NO_GENRES})
    column = {name: number for number, name in enumerate(genre_names)}
    movie_genres = np.zeros((len(movie_ids), len(genre_names)), np.float32)
    for row, names in enumerate(genres_of):
        movie_genres[row, [column[name] for name in names if name in column]] = 1.0
    years = [_YEAR_IN_TITLE.search(title.strip()) for title in titles]
    return MovieLens(
        user=user[order],
        movie=movie[order],
        rating=ratings[order, 2],
        timestamp=timestamp[order],
        user_ids=user_ids,
        movie_ids=movie_ids,
        titles=titles,
        release_year=np.array([int(found.group(1)) if found else 0 for found in years]),
        genre_names=genre_names,
        movie_genres=movie_genres,
    )
