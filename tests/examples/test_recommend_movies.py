"""The movie example: it learns, its files hold what it says, and no example sees its future."""

import contextlib
import io

import keras
import matplotlib.image
import numpy as np
import pytest
import recommend_movies as example
from sklearn.metrics import roc_auc_score

RATINGS = 9000  # of 61 users


@pytest.fixture(scope="module")
def data():
    return example.load_movielens(RATINGS)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A whole run with a tenth of the users: the folder, what it returned, what it printed."""
    folder, printed = tmp_path_factory.mktemp("movies") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        auc = example.main(epochs=4, limit=RATINGS, folder=folder)
    return folder, auc, printed.getvalue()


def test_learns_more_than_chance(ran):
    assert ran[1]["watched"] > 0.65 and ran[1]["liked"] > 0.55


def test_saved_ranker_gives_the_figures_that_were_printed(ran, data):
    folder, auc, printed = ran
    _, _, (x, y) = data
    predicted = keras.saving.load_model(folder / "ranker.keras").predict(x, verbose=0)
    watched = y["watched"][:, 0]
    for task, weight in (("watched", None), ("liked", watched)):
        # Keras counts at 200 thresholds.
        exact = roc_auc_score(y[task], predicted[task], sample_weight=weight)
        assert auc[task] == pytest.approx(exact, abs=0.01)
        assert f"AUC of {task}: {auc[task]:.3f}, by counting 0." in printed


def test_recommends_ten_movies_that_the_user_has_not_watched(ran, data):
    titles, (x, y), _ = data
    user = np.bincount(x["user"]).argmax()
    _, _, shown = ran[2].partition(f"For user {user}:\n")
    best = [line.strip() for line in shown.splitlines()[:10]]
    seen = x["movie"][(x["user"] == user) & (y["watched"][:, 0] == 1)]
    assert set(best) <= set(titles) and len(set(best)) == 10
    assert not set(best) & {titles[movie] for movie in seen}


def test_page_and_picture_show_the_gates(ran):
    folder = ran[0]
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "What each task takes" in page and "MMoE" in page and page.count("<img") == 2
    assert matplotlib.image.imread(folder / "gates.png")[..., :3].std() > 0.05


def test_nobody_is_tested_on_what_came_before_the_training(data):
    table = np.loadtxt(example.DATA / "ratings.csv", delimiter=",", skiprows=1)
    time = {(int(user), int(movie)): when for user, movie, _, when in table}
    titles, *parts = data
    with (example.DATA / "movies.csv").open(encoding="utf-8") as file:
        ids = [0, *(int(row["movieId"]) for row in example.csv.DictReader(file))]
    assert len(ids) == len(titles)

    last, moments = {}, []
    for number, (x, y) in enumerate(parts):
        rows = np.flatnonzero(y["watched"][:, 0])
        for user, movie, recent in zip(
            *(x[n][rows] for n in ("user", "movie", "recent")), strict=True
        ):
            now = time[user, ids[movie]]
            past = [time[user, ids[each]] for each in recent if each]
            assert all(each < now for each in past)  # a history has no moment of its own or later
            assert past == sorted(past, reverse=True)
            if number == 0:
                last[user] = max(now, last.get(user, 0))
            else:
                assert last[user] < now
            moments.append(now)
    assert len(moments) > 5000


def test_drawn_movies_share_user_and_moment_with_a_watched_one(data):
    for x, y in data[1:]:
        watched = y["watched"][:, 0] == 1
        assert watched.mean() == pytest.approx(0.2) and not y["liked"][~watched].any()
        for name in ("user", "recent"):
            np.testing.assert_array_equal(np.concatenate([x[name][watched]] * 5), x[name])
        assert set(x["movie"]) <= set(data[1][0]["movie"])  # none that training does not have
