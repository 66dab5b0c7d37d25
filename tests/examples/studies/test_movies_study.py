"""The movie study: no leak, a right split, right features, clear errors, a whole run."""

import dataclasses
import html.parser
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from common.seeds import paired_interval
from movielens.baselines import BiasModel, measure_baselines
from movielens.data import (
    TEST,
    TRAIN,
    VALIDATION,
    DataError,
    MovieLens,
    first_of_moment,
    load_movielens,
    split_by_time,
)
from movielens.features import PADDING, RARE, RECENT, SCALARS, Past, batches
from movielens.figures import FIGURES, compare, roc_auc

import keras_moe

STUDIES = Path(__file__).parents[3] / "examples" / "studies"
SCRIPT = STUDIES / "movies.py"
# The keras_moe of a child process is the one of this process, installed or not.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(keras_moe.__file__).parents[1])}
SHIPPED = STUDIES.parent / "data" / "ml-latest-small"


@pytest.fixture(scope="module")
def data() -> MovieLens:
    return load_movielens(SHIPPED)


@pytest.fixture(scope="module")
def past(data) -> Past:
    return Past(data, split_by_time(data))


def altered(data: MovieLens, rows: np.ndarray) -> MovieLens:
    """Return the data with other movies and other ratings in some rows, at the same times."""
    rng = np.random.default_rng(5)
    movie, rating = data.movie.copy(), data.rating.copy()
    movie[rows] = rng.integers(0, data.num_movies, int(rows.sum()))
    rating[rows] = rng.choice([0.5, 5.0], int(rows.sum()))
    return dataclasses.replace(data, movie=movie, rating=rating)


def middle_moment(past: Past) -> int:
    """Return the time of a training rating with as many before it as after it."""
    times = np.sort(past.ratings(TRAIN).timestamp)
    return int(times[len(times) // 2])


def equal_rows(first: dict, second: dict) -> np.ndarray:
    """Return, for every row, whether all features are equal."""
    return np.all(
        [
            np.isclose(first[n], second[n], rtol=0, atol=1e-5).reshape(len(first[n]), -1).all(1)
            for n in first
        ],
        axis=0,
    )


class TestData:
    def test_shipped_data_is_complete_with_its_terms(self, data):
        assert (len(data), data.num_users, data.num_movies) == (100_836, 610, 9_742)
        assert data.rating.mean() == pytest.approx(3.501557, abs=1e-6)
        terms = (SHIPPED / "README.txt").read_text(encoding="utf-8")
        assert "Usage License" in terms and "Harper" in terms

    def test_sorted_by_user_then_time(self, data):
        same_user = np.diff(data.user) == 0
        assert (np.diff(data.user) >= 0).all()
        assert (np.diff(data.timestamp)[same_user] >= 0).all()

    def test_titles_years_and_genres_belong_together(self, data):
        row = data.titles.index("Toy Story (1995)")
        assert data.movie_ids[row] == 1
        assert data.release_year[row] == 1995
        genres = {data.genre_names[g] for g in np.flatnonzero(data.movie_genres[row])}
        assert genres == {"Adventure", "Animation", "Children", "Comedy", "Fantasy"}
        assert "(no genres listed)" not in data.genre_names

    def test_reads_the_old_format(self, tmp_path):
        (tmp_path / "ratings.dat").write_text("1::2::4::978300760\n1::1::5::978300000\n")
        (tmp_path / "movies.dat").write_text(
            "1::Amélie (2001)::Comedy|Romance\n2::Heat (1995)::Action\n", encoding="latin-1"
        )
        data = load_movielens(tmp_path)
        assert data.titles == ["Amélie (2001)", "Heat (1995)"]
        assert data.rating.tolist() == [5.0, 4.0]  # sorted by time
        assert data.release_year.tolist() == [2001, 1995]

    def test_keeps_a_number_of_users(self):
        small = load_movielens(SHIPPED, max_users=10, seed=1)
        again = load_movielens(SHIPPED, max_users=10, seed=1)
        assert small.num_users == 10
        assert (small.user_ids == again.user_ids).all()

    @pytest.mark.parametrize(
        ("ratings", "movies", "message"),
        [
            (None, None, "does not hold the two files"),
            ("a,b\n1,2\n", "movieId,title,genres\n", "must start with the columns userId,movieId"),
            ("", "movieId,title,genres\n", "an empty file"),
            (
                "userId,movieId,rating,timestamp\n1,1,4,100\n",
                "id,title\n1,A\n",
                "must start with the columns movieId,title",
            ),
            ("userId,movieId,rating,timestamp\n", "movieId,title,genres\n1,A,B\n", "are empty"),
            (
                "userId,movieId,rating,timestamp\n1,1,4,100\n",
                "movieId,title,genres\n",
                "movies in .* are empty",
            ),
            (
                "userId,movieId,rating,timestamp\n1,1,good,100\n",
                "movieId,title,genres\n1,A,B\n",
                "row that is not a rating",
            ),
            (
                "userId,movieId,rating,timestamp\n1,1,9,100\n",
                "movieId,title,genres\n1,A,B\n",
                "outside 0 to 5",
            ),
            (
                "userId,movieId,rating,timestamp\n1,7,4,100\n",
                "movieId,title,genres\n1,A,B\n",
                "1 ratings .* movie id 7",
            ),
            (
                "userId,movieId,rating,timestamp\n1,1,4,100\n",
                "movieId,title,genres\n1,A\n",
                "not id, title, genres",
            ),
        ],
    )
    def test_wrong_data_says_what_is_wrong(self, tmp_path, ratings, movies, message):
        if ratings is not None:
            (tmp_path / "ratings.csv").write_text(ratings)
            (tmp_path / "movies.csv").write_text(movies)
        with pytest.raises(DataError, match=message) as caught:
            load_movielens(tmp_path)
        assert "\n" not in str(caught.value)


class TestSplit:
    def test_shares(self, data):
        counts = np.bincount(split_by_time(data))
        assert counts.sum() == len(data)
        assert counts / len(data) == pytest.approx([0.7, 0.1, 0.2], abs=0.02)

    def test_every_user_trains_before_validating_before_testing(self, data):
        period = split_by_time(data)
        for user in range(data.num_users):
            rows = data.user == user
            times = [data.timestamp[rows & (period == p)] for p in (TRAIN, VALIDATION, TEST)]
            assert len(times[0])
            times = [t for t in times if len(t)]
            for earlier, later in itertools.pairwise(times):
                assert earlier.max() < later.min()  # strictly: no moment is divided

    def test_ratings_of_one_moment_stay_together(self, data):
        period = split_by_time(data)
        same = (np.diff(data.user) == 0) & (np.diff(data.timestamp) == 0)
        assert same.sum() > 10_000  # the case is common in this data
        assert (np.diff(period)[same] == 0).all()

    def test_first_of_moment(self, data):
        tiny = dataclasses.replace(
            data, user=np.array([0, 0, 0, 0, 1]), timestamp=np.array([5, 7, 7, 8, 8])
        )
        assert first_of_moment(tiny).tolist() == [0, 1, 1, 3, 4]


class TestNoLeak:
    def test_test_ratings_change_no_training_or_validation_feature(self, data, past):
        other_data = altered(data, past.period == TEST)
        other = Past(other_data, past.period)
        for period in (TRAIN, VALIDATION):
            ours, theirs = (p.with_negatives(period, 2, seed=3) for p in (past, other))
            assert (ours.movie == theirs.movie).all()  # the same negatives are drawn
            same = equal_rows(past.features(ours), other.features(theirs))
            assert same.all()

    def test_nothing_at_or_after_a_moment_changes_its_features(self, data, past):
        """The strongest one: alter everybody's ratings from a moment on."""
        moment = middle_moment(past)
        other = Past(altered(data, data.timestamp >= moment), past.period)
        other.embedding_row = past.embedding_row  # rows come from training as a whole
        examples = past.with_negatives(TRAIN, 2, seed=3)
        examples = examples[np.flatnonzero(examples.timestamp <= moment)]
        assert (examples.timestamp == moment).any()
        assert equal_rows(past.features(examples), other.features(examples)).all()

    def test_features_are_the_same_in_a_world_without_future(self, data, past):
        """As if the data had been taken at that moment: later ratings do not exist at all."""
        moment = middle_moment(past)
        rows = data.timestamp <= moment
        names = ("user", "movie", "rating", "timestamp")
        world = dataclasses.replace(data, **{name: getattr(data, name)[rows] for name in names})
        other = Past(world, past.period[rows])
        other.embedding_row = past.embedding_row
        ours, theirs = past.ratings(TRAIN), other.ratings(TRAIN)
        ours = ours[np.flatnonzero(ours.timestamp <= moment)]
        np.testing.assert_array_equal(ours.movie, theirs.movie)
        assert equal_rows(past.features(ours), other.features(theirs)).all()

    def test_these_comparisons_can_fail(self, data, past):
        moment = middle_moment(past)
        other = Past(altered(data, data.timestamp >= moment - 86_400 * 30), past.period)
        other.embedding_row = past.embedding_row
        examples = past.ratings(TRAIN)
        examples = examples[np.flatnonzero(np.abs(examples.timestamp - moment) < 86_400 * 5)]
        assert not equal_rows(past.features(examples), other.features(examples)).all()

    def test_a_rating_does_not_change_its_own_features(self, data, past):
        """Also not through ratings of the same moment, nor through its movie's statistics."""
        rng = np.random.default_rng(0)
        for row in rng.choice(np.flatnonzero(past.period == TRAIN), 5):
            rows = (data.user == data.user[row]) & (data.timestamp == data.timestamp[row])
            rating = np.where(rows, 5.5 - data.rating, data.rating)
            other = Past(dataclasses.replace(data, rating=rating), past.period)
            which = np.flatnonzero(np.flatnonzero(past.period == TRAIN) == row)
            ours = past.ratings(TRAIN)[which]
            assert equal_rows(past.features(ours), other.features(ours)).all()

    def test_movie_statistics_ignore_validation_and_test(self, data, past):
        others = altered(data, past.period != TRAIN)
        other = Past(others, past.period)
        examples = past.with_negatives(TEST, 1, seed=0)
        ours, theirs = (p.features(examples)["scalars"] for p in (past, other))
        of_movie = [
            SCALARS.index(name)
            for name in (
                "movie: ratings so far",
                "movie: ratings in the last year",
                "movie: mean rating",
                "movie: mean rating above its raters' own means",
            )
        ]
        np.testing.assert_allclose(ours[:, of_movie], theirs[:, of_movie], atol=1e-5)

    def test_user_features_of_a_negative_are_those_of_its_moment(self, past):
        examples = past.with_negatives(VALIDATION, 1, seed=0)
        positives = np.flatnonzero((examples.watched == 1) & (examples.in_catalogue == 1))
        features = past.features(examples)
        for name in ("recent", "recent_liked", "genre_share", "genre_liking", "user"):
            np.testing.assert_array_equal(
                features[name][positives], features[name][np.flatnonzero(examples.watched == 0)]
            )


class TestNegatives:
    def test_watched_movies_are_not_drawn(self, data, past):
        for period in (TRAIN, VALIDATION, TEST):
            negatives = past.negatives(past.ratings(period), period, 3, seed=1)
            known = past.period <= period
            watched = set(zip(data.user[known].tolist(), data.movie[known].tolist(), strict=True))
            drawn = zip(negatives.user.tolist(), negatives.movie.tolist(), strict=True)
            assert watched.isdisjoint(drawn)

    def test_training_negatives_know_nothing_of_the_test_period(self, data, past):
        """Some are movies that the user watches later: leaving them out would tell which."""
        negatives = past.negatives(past.ratings(TRAIN), TRAIN, 4, seed=1)
        later = past.period == TEST
        watched = set(zip(data.user[later].tolist(), data.movie[later].tolist(), strict=True))
        drawn = set(zip(negatives.user.tolist(), negatives.movie.tolist(), strict=True))
        assert len(watched & drawn) > 100

    def test_positives_and_negatives_are_in_the_catalogue_of_their_moment(self, data, past):
        training = past.period == TRAIN
        first = np.full(data.num_movies, 2**62)
        np.minimum.at(first, data.movie[training], data.timestamp[training])
        examples = past.with_negatives(TEST, 2, seed=1)
        inside = first[examples.movie] < examples.timestamp
        np.testing.assert_array_equal(inside, examples.in_catalogue == 1)
        weights = examples.sample_weights()
        np.testing.assert_array_equal(weights["engagement"], inside)
        np.testing.assert_array_equal(weights["liked"], examples.watched)
        np.testing.assert_array_equal(weights["rating"], examples.watched)

    def test_a_movie_enters_the_catalogue_after_its_first_training_rating(self, data, past):
        training = np.flatnonzero(past.period == TRAIN)
        row = training[np.argsort(data.timestamp[training])[len(training) // 2]]
        movie = data.movie[row]
        first = data.timestamp[training[data.movie[training] == movie]].min()
        assert movie not in past.catalogue(first)
        assert movie in past.catalogue(first + 1)

    def test_seeded(self, past):
        positives = past.ratings(VALIDATION)
        first, again, other = (past.negatives(positives, VALIDATION, 2, seed=s) for s in (1, 1, 2))
        assert (first.movie == again.movie).all()
        assert (first.movie != other.movie).mean() > 0.9


@pytest.fixture(scope="module")
def tiny() -> Past:
    """One user, five films a day apart, and another who rated film 0 at first."""
    data = MovieLens(
        user=np.array([0, 0, 0, 0, 0, 1]),
        movie=np.array([0, 1, 2, 3, 4, 0]),
        rating=np.array([5.0, 3.0, 4.0, 1.0, 2.0, 2.0]),
        timestamp=np.array([1, 2, 2, 3, 4, 0]) * 86_400,
        user_ids=np.array([10, 20]),
        movie_ids=np.arange(5),
        titles=list("abcde"),
        release_year=np.array([1990, 1992, 0, 2000, 1994]),
        genre_names=["Comedy", "Drama"],
        movie_genres=np.array([[1, 0], [1, 1], [0, 1], [0, 0], [1, 0]], np.float32),
    )
    return Past(data, np.full(6, TRAIN), rare_below=1)


class TestFeatures:
    def scalar(self, past: Past, name: str) -> np.ndarray:
        return past.features(past.ratings(TRAIN))["scalars"][:, SCALARS.index(name)]

    def test_counts_are_of_the_strictly_earlier_past(self, tiny):
        counts = np.expm1(self.scalar(tiny, "ratings so far"))
        np.testing.assert_allclose(counts, [0, 1, 1, 3, 4, 0], atol=1e-5)

    def test_history_is_newest_first_and_padded(self, tiny):
        features = tiny.features(tiny.ratings(TRAIN))
        row = tiny.embedding_row
        assert features["recent"].shape == (6, RECENT)
        assert features["recent"][3, :4].tolist() == [row[2], row[1], row[0], PADDING]
        assert (features["recent"][0] == PADDING).all()
        assert (features["recent"][5] == PADDING).all()  # not the other user's
        assert features["recent_liked"][4, :3].tolist() == [row[2], row[0], PADDING]

    def test_means(self, tiny):
        # Before the fourth rating: 5, 3, 4, that is 1.5 - 0.5 + 0.5 above the middle.
        mean = self.scalar(tiny, "mean rating so far")
        assert mean[3] == pytest.approx(1.5 / (3 + 5))
        last = self.scalar(tiny, "mean of the last 5 ratings")
        assert last[3] == pytest.approx(1.5 / (3 + 1))
        movie = self.scalar(tiny, "movie: mean rating")
        assert movie[0] == pytest.approx((2 - 3.5) / (1 + 5))  # the other user's, a day before
        assert movie[5] == 0

    def test_genres(self, tiny):
        share = tiny.features(tiny.ratings(TRAIN))["genre_share"]
        np.testing.assert_allclose(share[3], [2 / 3, 2 / 3])

    def test_usual_years_skip_unknown_ones(self, tiny):
        distance = self.scalar(tiny, "movie: distance to the user's usual years")
        assert distance[3] == pytest.approx(np.log1p(2000 - 1991))
        assert distance[2] == 0

    def test_real_features_are_finite_and_typed(self, past):
        for batch in batches(past, past.with_negatives(TEST, 1, seed=0), 4096):
            for name, values in batch["features"].items():
                assert np.isfinite(values).all(), name
                assert values.dtype in (np.float32, np.int32)
            assert batch["features"]["movie"].max() < past.num_embedding_rows
            assert batch["features"]["movie"].min() >= RARE

    def test_rare_movies_share_a_row(self, data, past):
        count = np.bincount(data.movie[past.period == TRAIN], minlength=data.num_movies)
        assert (past.embedding_row[count < 5] == RARE).all()
        common = past.embedding_row[count >= 5]
        assert len(set(common.tolist())) == len(common)

    def test_shuffled_batches_cover_every_example_once(self, past):
        examples = past.ratings(VALIDATION)
        parts = list(batches(past, examples, 1000, seed=1))
        stars = np.concatenate([part["labels"]["rating"] for part in parts])
        assert len(stars) == len(examples)
        assert sorted(stars) == sorted(examples.rating)
        assert (stars != examples.rating).any()


class TestFigures:
    def test_auc_counts_ties_as_half(self):
        assert roc_auc([1, 0, 1, 0], [0.9, 0.1, 0.8, 0.2]) == 1.0
        assert roc_auc([1, 0], [0.5, 0.5]) == 0.5
        assert roc_auc([1, 0, 0], [0.5, 0.5, 0.1]) == 0.75

    def test_paired_interval(self):
        mean, half_width = paired_interval([1.0, 2.0, 3.0], [0.0, 0.0, 0.0])
        assert mean == 2.0
        assert half_width == pytest.approx(4.303 / np.sqrt(3))

    @pytest.mark.parametrize(
        ("mmoe", "shared_bottom", "words"),
        [
            ([0.90, 0.91, 0.90], [0.80, 0.81, 0.80], "MMoE is better"),
            ([0.80, 0.81, 0.80], [0.90, 0.91, 0.90], "MMoE is worse"),
            ([0.80, 0.90, 0.85], [0.90, 0.80, 0.85], "no difference"),
            ([0.80], [0.90], "one seed cannot tell"),
        ],
    )
    def test_verdicts(self, mmoe, shared_bottom, words):
        assert words in compare(FIGURES[0], mmoe, shared_bottom)

    def test_lower_rmse_is_better(self):
        assert "is better" in compare(FIGURES[2], [0.8, 0.8, 0.81], [0.9, 0.9, 0.91])

    def test_baselines(self, past):
        validation, test = (past.with_negatives(p, 1, seed=0) for p in (VALIDATION, TEST))
        figures = measure_baselines(past, validation, test)
        assert 0.65 < figures["popularity, ever"]["engagement"] < 0.8
        assert 0.8 < figures["user and movie bias"]["rating"] < 0.9

    def test_the_bias_model_does_not_see_its_own_rating(self, data, past):
        model, ratings = BiasModel(past), past.ratings(TEST)
        rows = np.flatnonzero(past.period == TEST)
        last = rows[np.diff(data.user[rows], append=-1) != 0]  # each user's last rating
        rating = data.rating.copy()
        rating[last] = 5.5 - rating[last]
        other = BiasModel(Past(dataclasses.replace(data, rating=rating), past.period))
        other._fit(*model.choice)
        moments = first_of_moment(data)[rows]
        alone = np.isin(rows, last) & (moments == rows)
        np.testing.assert_allclose(model(ratings)[alone], other(ratings)[alone], atol=1e-9)


def run_script(*arguments: str, cwd: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(SCRIPT), *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=300,
        env=ENVIRONMENT,
    )


class Loads(html.parser.HTMLParser):
    """Collects what a page would load."""

    def __init__(self):
        super().__init__()
        self.sources, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("movies_study")


@pytest.fixture(scope="module")
def quick(folder) -> subprocess.CompletedProcess:
    return run_script("--quick", "--out", "first", cwd=folder)


class TestScript:
    def test_succeeds_and_prints_what_it_promises(self, quick):
        assert quick.returncode == 0, quick.stderr[-3000:]
        shown = " ".join(quick.stdout.split())  # lines wrap where paths are long
        for words in (
            "Harper and Joseph A. Konstan",
            "Epoch 2/2",
            "Engagement AUC",
            "Liked AUC",
            "Rating RMSE",
            "Shared bottom",
            "MMoE - shared bottom",
            "popularity",
            "user and movie bias",
            "P(watch) * P(liked) * rating",
            "Mean gate weight",
            "predictions differ by at most 0.0e+00",
            "Total time",
        ):
            assert words in shown, words
        assert "Traceback" not in quick.stderr

    def test_report_is_one_file_with_all_pictures(self, quick, folder):
        page = (folder / "first" / "report.html").read_text(encoding="utf-8")
        loads = Loads()
        loads.feed(page)
        assert loads.tags.count("img") == 4
        assert all(source.startswith("data:image/png;base64,") for source in loads.sources)
        assert not {"script", "link", "iframe"} & set(loads.tags)
        assert "@import" not in page and "url(" not in page
        assert "Harper" in page and "no commercial use" in page
        for figure in FIGURES:
            assert figure.title in page

    def test_models_have_equal_size(self, quick, folder):
        models = json.loads((folder / "first" / "figures.json").read_text())["models"]
        mmoe, shared_bottom = (models[t]["parameters"] for t in ("mmoe", "shared_bottom"))
        assert mmoe == pytest.approx(shared_bottom, rel=0.02)

    def test_same_seed_same_figures(self, quick, folder):
        import movies

        assert movies.main(["--quick", "--out", str(folder / "second")]) == 0
        first, second = (
            json.loads((folder / name / "figures.json").read_text())["models"]
            for name in ("first", "second")
        )
        for trunk in first:
            for task, values in first[trunk]["test"].items():
                assert second[trunk]["test"][task] == pytest.approx(values, abs=1e-6)

    def test_saved_model_loads_in_a_fresh_process_without_the_script(self, quick, folder):
        code = (
            "import keras, keras_moe.layers\n"
            "model = keras.saving.load_model('first/mmoe_ranker.keras')\n"
            "print(sorted(model.output))\n"
        )
        loaded = subprocess.run(
            [sys.executable, "-c", code],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=120,
            env=ENVIRONMENT,
        )
        assert loaded.stdout.strip() == "['engagement', 'liked', 'rating']", loaded.stderr[-2000:]

    def test_wrong_data_is_one_line_and_exit_code_2(self, capsys):
        import movies

        assert movies.main(["--data", "no/such/folder"]) == 2
        error = capsys.readouterr().err
        assert "there is no folder 'no/such/folder'. Expected a folder with" in error
        assert error.count("\n") == 1

    def test_wrong_user_is_an_error_too(self, capsys):
        import movies

        assert movies.main(["--user", "611"]) == 2
        error = capsys.readouterr().err
        assert "there is no user 611. The ids go from 1 to 610" in error
        assert error.count("\n") == 1


@pytest.fixture(scope="module")
def build():
    from movielens.model import build_ranker, movie_features

    described = movie_features(
        num_users=7,
        num_movie_rows=11,
        num_genres=3,
        scalar_mean=np.zeros(4, "float32"),
        scalar_variance=np.ones(4, "float32"),
    )
    return lambda trunk, **settings: build_ranker(trunk, described, **settings)


class TestModel:
    @pytest.mark.parametrize(("num_experts", "expert_units"), [(2, 64), (4, 32), (8, 16)])
    def test_equal_parameters_outside_embeddings(self, build, num_experts, expert_units):
        from movielens.model import count_dense_parameters

        sizes = [
            count_dense_parameters(build(trunk, num_experts=num_experts, expert_units=expert_units))
            for trunk in ("mmoe", "shared_bottom")
        ]
        assert abs(sizes[0] - sizes[1]) / sizes[0] < 0.02

    def test_reads_the_features_that_the_data_has(self, build, past):
        inputs = build("mmoe").input
        batch = past.features(past.ratings(VALIDATION)[:3])
        assert set(inputs) == set(batch)
        lengths = {name: values.ndim for name, values in batch.items()}
        assert lengths == {name: len(tensor.shape) for name, tensor in inputs.items()}
