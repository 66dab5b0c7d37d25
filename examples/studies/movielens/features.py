"""What the models see: features of the strictly earlier past, and sampled negatives.

Every feature of a user at time t is computed from that user's ratings with a timestamp < t,
whatever their period: a running service knows what its user did a minute ago. Every statistic of a
movie at time t is computed from *training* ratings, by anybody, with a timestamp < t. Nothing here
looks at t or later, so a feature cannot tell its own label.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from movielens.data import LIKED_FROM, TRAIN, MovieLens, first_of_moment, user_starts

PADDING, RARE = 0, 1  # rows of the movie embedding that are no movie of their own
RECENT = 20  # movies of the history that the models see one by one
MIDDLE = 3.5  # stars; a constant, so that smoothing uses no statistic of the data
DAY, YEAR = 86_400, 31_556_952  # seconds
SCALARS = (
    "ratings so far",
    "mean rating so far",
    "mean of the last 5 ratings",
    "mean of the last 20 ratings",
    "share liked so far",
    "hours since last rating",
    "days since first rating",
    "calendar year",
    "hour, sine",
    "hour, cosine",
    "season, sine",
    "season, cosine",
    "movie: ratings so far",
    "movie: ratings in the last year",
    "movie: share of all ratings",
    "movie: mean rating",
    "movie: mean rating above its raters' own means",
    "movie: age",
    "movie: genres watched by the user",
    "movie: genres liked by the user",
    "movie: distance to the user's usual years",
    "movie: distance to the years of the user's last 5 movies",
    "movie: ratings so far, against the user's last 5 movies",
)
_KEY = 2**33  # larger than any timestamp


@dataclass(frozen=True)
class Examples:
    """One row per (user, movie, moment): watched ones and sampled negatives."""

    user: np.ndarray
    movie: np.ndarray
    timestamp: np.ndarray
    past: np.ndarray  # the user's ratings before this index are strictly earlier
    watched: np.ndarray  # 1 for a rating, 0 for a sampled negative
    in_catalogue: np.ndarray  # 1 where engagement is learned and measured
    rating: np.ndarray  # 0 for negatives

    @property
    def liked(self) -> np.ndarray:
        return (self.rating >= LIKED_FROM).astype(np.float32)

    def __len__(self) -> int:
        return len(self.user)

    def __getitem__(self, rows) -> Examples:
        return Examples(*(getattr(self, name)[rows] for name in self.__dataclass_fields__))

    def labels(self) -> dict[str, np.ndarray]:
        return {
            "engagement": self.watched.astype(np.float32),
            "liked": self.liked,
            "rating": self.rating.astype(np.float32),
        }

    def sample_weights(self) -> dict[str, np.ndarray]:
        """Return each task's mask: a movie that was not watched has no rating to learn from."""
        watched = self.watched.astype(np.float32)
        return {
            "engagement": self.in_catalogue.astype(np.float32),
            "liked": watched,
            "rating": watched,
        }


class Past:
    """Answers, for any user, movie and moment: what was known just before?

    Args:
        data: Ratings as `load_movielens` returns them.
        period: The period of every rating, as `split_by_time` returns it.
        rare_below: Movies with fewer training ratings share one embedding row. Defaults to 5.
    """

    def __init__(self, data: MovieLens, period: np.ndarray, rare_below: int = 5):
        self.data = data
        self.period = period
        self.start = user_starts(data)
        self.past = first_of_moment(data)
        self._sum_users()
        self._sum_movies()
        training_count = np.bincount(data.movie[period == TRAIN], minlength=data.num_movies)
        self.embedding_row = np.full(data.num_movies, RARE, np.int32)
        common = np.flatnonzero(training_count >= rare_below)
        self.embedding_row[common] = np.arange(len(common)) + RARE + 1
        self.num_embedding_rows = len(common) + RARE + 1

    def _sum_users(self) -> None:
        """Running sums over the sorted ratings, each without its own row."""
        data = self.data
        genres = data.movie_genres.astype(np.int32)
        half_stars = np.round(2 * data.rating).astype(np.int64)
        liked = data.rating >= LIKED_FROM
        self._stars_before = _running_sum(data.rating - MIDDLE)
        self._liked_before = _running_sum(liked.astype(np.int64))
        self._liked_at = np.flatnonzero(liked)
        self._rated_at = np.arange(len(data))
        self._genres_before = _running_sum(genres[data.movie])
        excess = (half_stars - round(2 * MIDDLE)).astype(np.int32)
        self._genre_stars_before = _running_sum(genres[data.movie] * excess[:, None])
        year = data.release_year[data.movie]
        self._years_before = _running_sum(year)
        self._dated_before = _running_sum((year > 0).astype(np.int64))

    def _sum_movies(self) -> None:
        """Sort training ratings by movie, then time, with running sums over them."""
        data = self.data
        rows = np.flatnonzero(self.period == TRAIN)
        rows = rows[np.lexsort((data.timestamp[rows], data.movie[rows]))]
        self._movie_keys = data.movie[rows] * _KEY + data.timestamp[rows]
        own_mean = MIDDLE + self._user_mean(data.user[rows], self.past[rows])
        self._movie_stars = _running_sum(data.rating[rows] - MIDDLE)
        self._movie_excess = _running_sum(data.rating[rows] - own_mean)
        self._training_times = np.sort(data.timestamp[rows])
        first = np.full(data.num_movies, np.iinfo(np.int64).max)
        np.minimum.at(first, data.movie[rows], data.timestamp[rows])
        self._catalogue = np.argsort(first, kind="stable")
        self._first_seen = first
        begin, end = self._movie_slice(data.movie, data.timestamp)
        self._fame_before = _running_sum(np.log1p(end - begin))

    def _since_start(self, sums: np.ndarray, user: np.ndarray, past: np.ndarray) -> np.ndarray:
        return sums[past] - sums[self.start[user]]

    def _user_mean(self, user: np.ndarray, past: np.ndarray) -> np.ndarray:
        """Return the user's mean rating so far, minus the middle, drawn towards it."""
        return self._since_start(self._stars_before, user, past) / (past - self.start[user] + 5)

    def _over_last(self, sums: np.ndarray, user: np.ndarray, past: np.ndarray, last: int) -> tuple:
        """Return the sum over the user's last ratings before `past`, and how many they are."""
        begin = np.maximum(past - last, self.start[user])
        return sums[past] - sums[begin], past - begin

    def _movie_slice(self, movie: np.ndarray, timestamp: np.ndarray) -> tuple:
        """Return where the movie's training ratings before the time begin and end."""
        begin = np.searchsorted(self._movie_keys, movie * _KEY)
        return begin, np.searchsorted(self._movie_keys, movie * _KEY + timestamp)

    def catalogue(self, timestamp: int) -> np.ndarray:
        """Return the movies that somebody rated in training before this time."""
        return self._catalogue[: self._catalogue_size(np.array([timestamp]))[0]]

    def _catalogue_size(self, timestamp: np.ndarray) -> np.ndarray:
        return np.searchsorted(self._first_seen[self._catalogue], timestamp, side="left")

    def was_rated_in_training(self, movie: np.ndarray) -> np.ndarray:
        return self._first_seen[movie] < np.iinfo(np.int64).max

    def ratings(self, period: int) -> Examples:
        """Return the ratings of one period as examples, without negatives."""
        data = self.data
        rows = np.flatnonzero(self.period == period)
        return Examples(
            user=data.user[rows],
            movie=data.movie[rows],
            timestamp=data.timestamp[rows],
            past=self.past[rows],
            watched=np.ones(len(rows), np.int8),
            in_catalogue=self._first_seen[data.movie[rows]] < data.timestamp[rows],
            rating=data.rating[rows],
        )

    def negatives(self, positives: Examples, period: int, each: int, seed: int) -> Examples:
        """Draw movies that the user did not watch, at the moment of each positive.

        A negative is drawn uniformly from the movies of the catalogue at that moment (somebody
        rated them in training before it) that the user did not rate in this period or an earlier
        one. Later periods are not consulted: in training, a movie that the user will watch in the
        test period can be drawn like any other. A positive that is not itself in the catalogue
        gets no negatives and no engagement label, or being unknown would mark it as watched.

        Args:
            positives: Ratings of one period.
            period: Which one.
            each: Negatives per positive.
            seed: Seed of the draw.

        Returns:
            The negatives as examples.
        """
        data = self.data
        rng = np.random.default_rng(seed)
        asked = positives[np.flatnonzero(positives.in_catalogue)]
        asked = asked[np.repeat(np.arange(len(asked)), each)]
        known = self.period <= period
        watched = np.sort(data.user[known] * data.num_movies + data.movie[known])
        size = self._catalogue_size(asked.timestamp)
        movie = np.full(len(asked), -1)
        for _ in range(50):
            open_rows = np.flatnonzero(movie < 0)
            if not len(open_rows):
                break
            drawn = self._catalogue[rng.integers(0, size[open_rows])]
            pair = asked.user[open_rows] * data.num_movies + drawn
            place = np.minimum(np.searchsorted(watched, pair), len(watched) - 1)
            movie[open_rows] = np.where(watched[place] == pair, -1, drawn)
        found = np.flatnonzero(movie >= 0)
        asked = asked[found]
        return Examples(
            user=asked.user,
            movie=movie[found],
            timestamp=asked.timestamp,
            past=asked.past,
            watched=np.zeros(len(found), np.int8),
            in_catalogue=np.ones(len(found), bool),
            rating=np.zeros(len(found)),
        )

    def with_negatives(self, period: int, each: int, seed: int) -> Examples:
        """Return the ratings of a period followed by their sampled negatives."""
        positives = self.ratings(period)
        negatives = self.negatives(positives, period, each, seed)
        names = Examples.__dataclass_fields__
        return Examples(
            *(np.concatenate([getattr(positives, n), getattr(negatives, n)]) for n in names)
        )

    def popularity(self, examples: Examples) -> dict[str, np.ndarray]:
        """Return how many training ratings each movie had, ever before and in the year before."""
        begin, end = self._movie_slice(examples.movie, examples.timestamp)
        _, year_ago = self._movie_slice(examples.movie, examples.timestamp - YEAR)
        return {"ever": end - begin, "last year": end - year_ago}

    def features(self, examples: Examples) -> dict[str, np.ndarray]:
        """Return the models' inputs, each with one row per example."""
        data, user, movie, past = self.data, examples.user, examples.movie, examples.past
        genres = data.movie_genres[movie]
        count = past - self.start[user]
        seen = self._since_start(self._genres_before, user, past)
        stars = self._since_start(self._genre_stars_before, user, past) / 2
        mean = self._user_mean(user, past)
        genre_share = seen / np.maximum(count, 1)[:, None]
        genre_liking = (stars - mean[:, None] * seen) / (seen + 5)
        year = data.release_year[movie]
        return {
            "user": user.astype(np.int32),
            "movie": self.embedding_row[movie],
            "year": np.where(year > 0, np.clip((year - 1900) // 5, 0, 28) + 1, 0).astype(np.int32),
            "genres": genres,
            "recent": self._last(self._rated_at, past, user),
            "recent_liked": self._last(self._liked_at, self._liked_before[past], user),
            "genre_share": genre_share.astype(np.float32),
            "genre_liking": genre_liking.astype(np.float32),
            "scalars": self._scalars(examples, genres, genre_share, genre_liking, mean),
        }

    def _last(self, index: np.ndarray, end: np.ndarray, user: np.ndarray) -> np.ndarray:
        """Return embedding rows of the user's last movies among index[:end], newest first."""
        place = end[:, None] - 1 - np.arange(RECENT)
        rating = index[np.maximum(place, 0)] if len(index) else np.zeros_like(place)
        own = (place >= 0) & (rating >= self.start[user][:, None])
        row = self.embedding_row[self.data.movie[rating]]
        return np.where(own, row, PADDING).astype(np.int32)

    def _scalars(self, examples, genres, genre_share, genre_liking, mean) -> np.ndarray:
        data, user, time, past = self.data, examples.user, examples.timestamp, examples.past
        first = self.start[user]
        count = past - first
        liked = self._since_start(self._liked_before, user, past)
        last_time = np.where(count > 0, data.timestamp[np.maximum(past - 1, 0)], time)
        first_time = np.where(count > 0, data.timestamp[first], time)
        begin, end = self._movie_slice(examples.movie, time)
        _, year_ago = self._movie_slice(examples.movie, time - YEAR)
        ever = end - begin
        total = np.searchsorted(self._training_times, time)
        calendar_year = 1970 + time / YEAR
        release = data.release_year[examples.movie]
        age = np.where(release > 0, np.maximum(calendar_year - release, 0), 20)
        years, _ = self._over_last(self._years_before, user, past, len(data))
        dated, _ = self._over_last(self._dated_before, user, past, len(data))
        last_years, _ = self._over_last(self._years_before, user, past, 5)
        last_dated, _ = self._over_last(self._dated_before, user, past, 5)
        stars_5, count_5 = self._over_last(self._stars_before, user, past, 5)
        stars_20, count_20 = self._over_last(self._stars_before, user, past, 20)
        fame_5, _ = self._over_last(self._fame_before, user, past, 5)
        of_movie = np.maximum(genres.sum(1), 1)
        hour = 2 * np.pi * (time % DAY) / DAY
        season = 2 * np.pi * (calendar_year % 1)
        columns = (
            np.log1p(count),
            mean,
            stars_5 / (count_5 + 1),
            stars_20 / (count_20 + 1),
            (liked + 2.5) / (count + 5),
            np.log1p((time - last_time) / 3600),
            np.log1p((time - first_time) / DAY),
            (calendar_year - 2005) / 10,
            np.sin(hour),
            np.cos(hour),
            np.sin(season),
            np.cos(season),
            np.log1p(ever),
            np.log1p(end - year_ago),
            np.log((ever + 1) / (total + 1000)),
            (self._movie_stars[end] - self._movie_stars[begin]) / (ever + 5),
            (self._movie_excess[end] - self._movie_excess[begin]) / (ever + 5),
            np.log1p(age),
            (genres * genre_share).sum(1) / of_movie,
            (genres * genre_liking).sum(1) / of_movie,
            _distance(release, years, dated),
            _distance(release, last_years, last_dated),
            np.where(count_5 > 0, np.log1p(ever) - fame_5 / np.maximum(count_5, 1), 0),
        )
        return np.stack(columns, axis=1).astype(np.float32)


def batches(
    past: Past, examples: Examples, batch_size: int, seed: int | None = None
) -> Iterator[dict[str, dict[str, np.ndarray]]]:
    """Yield successive batches as dicts of features, labels and weights; shuffled given a seed."""
    order = np.arange(len(examples))
    if seed is not None:
        order = np.random.default_rng(seed).permutation(len(examples))
    for begin in range(0, len(examples), batch_size):
        rows = examples[order[begin : begin + batch_size]]
        yield {
            "features": past.features(rows),
            "labels": rows.labels(),
            "weights": rows.sample_weights(),
        }


def _distance(release: np.ndarray, years: np.ndarray, dated: np.ndarray) -> np.ndarray:
    """Return the signed log distance of a year to the mean of others; 0 where one is unknown."""
    distance = release - years / np.maximum(dated, 1)
    known = (release > 0) & (dated > 0)
    return np.where(known, np.sign(distance) * np.log1p(np.abs(distance)), 0)


def _running_sum(values: np.ndarray) -> np.ndarray:
    """Return sums over all rows before each row, and at last over all rows."""
    sums = np.zeros((len(values) + 1, *values.shape[1:]), np.result_type(values, np.int32))
    np.cumsum(values, axis=0, out=sums[1:])
    return sums
