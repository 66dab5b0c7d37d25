"""Recommend movies: will this user watch it, and will they like it?

Two tasks and one network, in a `tfrs.Model` of TensorFlow Recommenders: a Multi-gate
Mixture-of-Experts (MMoE), as in "Recommending What Video to Watch Next" (Zhao et al. 2019). The
tasks share four experts, and each has a gate of its own that mixes them.

    python examples/recommend_movies.py

Look at `results/movies`: `report.html` and `gates.png`, what each task takes of each expert;
`ranker.keras`, the model. Against a shared bottom, with intervals: `examples/studies/movies.py`.

Data: F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and Context.
ACM TiiS 5, 4: 19:1-19:19. Terms of use: `data/ml-latest-small/README.txt`.
"""

import os

# TensorFlow Recommenders needs Keras 2, keras_moe Keras 3: `KerasBridge` joins them.
os.environ.update(TF_USE_LEGACY_KERAS="1", KERAS_BACKEND="tensorflow")

import csv
from pathlib import Path

import keras
import numpy as np
import tensorflow_recommenders as tfrs
import tf_keras
from sklearn.metrics import roc_auc_score

from keras_moe import models, plots, report
from keras_moe.integrations.tfrs import KerasBridge
from keras_moe.models.features import Categorical, History

DATA = Path(__file__).parent / "data" / "ml-latest-small"


class Recommender(tfrs.Model):
    """A Keras 3 ranker that learns two tasks of TensorFlow Recommenders at once."""

    def __init__(self, ranker: keras.Model) -> None:
        super().__init__()
        self.ranker = KerasBridge(ranker)
        entropy = tf_keras.losses.BinaryCrossentropy()
        self.watched = tfrs.tasks.Ranking(entropy, [tf_keras.metrics.AUC(name="watched")])
        self.liked = tfrs.tasks.Ranking(entropy, [tf_keras.metrics.AUC(name="liked")])

    def call(self, inputs, training=None):
        return self.ranker(inputs, training=training)

    def compute_loss(self, data, training=False):
        inputs, labels = data
        predicted = self(inputs, training=training)
        loss = self.watched(labels["watched"], predicted["watched"])
        known = 5 * labels["watched"]  # nobody has judged the four of five that were not watched
        return loss + self.liked(labels["liked"], predicted["liked"], sample_weight=known)


def load_movielens(limit: int | None = None) -> tuple:
    """Return titles, and inputs and labels to train and to test on: each user's last fifth."""
    with (DATA / "movies.csv").open(encoding="utf-8") as file:
        titles = {int(row["movieId"]): row["title"] for row in csv.DictReader(file)}
    table = np.loadtxt(DATA / "ratings.csv", delimiter=",", skiprows=1, max_rows=limit)
    user, movie, stars, time = table[np.lexsort((table[:, 3], table[:, 0]))].T
    movie = np.searchsorted(list(titles), movie).astype("int32") + 1  # 0 is padding
    # People rate many movies in one second: what they watched before ends where it begins.
    first, before = (np.searchsorted(key, key) for key in (user, user * 2**33 + time))
    user = user.astype("int32")
    recent = before[:, None] - 1 - np.arange(20)
    recent = np.where(recent >= first[:, None], movie[recent], 0)
    is_test = before - first >= 0.8 * np.bincount(user)[user]
    catalogue, parts = np.unique(movie[~is_test]), []
    for rows in (np.flatnonzero(~is_test), np.flatnonzero(is_test & np.isin(movie, catalogue))):
        inputs = {"user": user[rows], "movie": movie[rows], "recent": recent[rows]}
        # Beside each movie that was watched, four at random, which count as not watched.
        inputs = {name: np.concatenate([column] * 5) for name, column in inputs.items()}
        inputs["movie"][len(rows) :] = np.random.default_rng(0).choice(catalogue, 4 * len(rows))
        given = np.concatenate([stars[rows], np.zeros(4 * len(rows))])[:, None]
        parts.append((inputs, {"watched": (given > 0) * 1.0, "liked": (given >= 4) * 1.0}))
    return ["", *titles.values()], *parts


def main(epochs: int = 5, limit: int | None = None, folder: Path = Path("results/movies")) -> dict:
    titles, (x, y), (x_test, y_test) = load_movielens(limit)
    user, movie = Categorical("user", int(x["user"].max()) + 1), Categorical("movie", len(titles))
    ranker = models.multitask_ranker(
        [user, movie, History("recent", 20, of="movie")],
        tasks={"watched": "binary", "liked": "binary"},
        interactions=[("user", "movie"), ("recent", "movie")],
        seed=0,
    )
    model = Recommender(ranker)
    model.compile(tf_keras.optimizers.Adam(4e-3))
    model.fit(x, y, batch_size=4096, epochs=epochs, verbose=2)
    auc = model.evaluate(x_test, y_test, batch_size=8192, verbose=0, return_dict=True)
    # Without a network: how many watched a movie, and which share of them liked it.
    watched, liked = (np.bincount(x["movie"], y[task][:, 0], len(titles)) for task in y)
    share, known = (liked + 2) / (watched + 4), y_test["watched"][:, 0]
    for task, count, weight in (("watched", watched, None), ("liked", share, known)):
        by_count = roc_auc_score(y_test[task], count[x_test["movie"]], sample_weight=weight)
        print(f"AUC of {task}: {auc[task]:.3f}, by counting {by_count:.3f}")

    someone = np.bincount(x["user"]).argmax()  # who rated most, when their test begins
    begin = np.flatnonzero(x_test["user"] == someone)[:1]
    is_seen = (x["user"] == someone) & (y["watched"][:, 0] == 1)
    unseen = np.setdiff1d(x["movie"], x["movie"][is_seen])
    asked = {name: column[begin.repeat(len(unseen))] for name, column in x_test.items()}
    predicted = model.predict({**asked, "movie": unseen}, verbose=0)
    best = np.argsort(-(predicted["watched"] * predicted["liked"])[:, 0])[:10]
    print(f"For user {someone}:", *(titles[number] for number in unseen[best]), sep="\n    ")

    folder.mkdir(parents=True, exist_ok=True)
    ranker.save(folder / "ranker.keras")
    sample = {name: column[::200] for name, column in x_test.items()}
    plots.task_gates(ranker, sample).savefig(folder / "gates.png")
    print("The page:", report(ranker, sample, folder / "report.html", title="Movie experts"))
    return auc


if __name__ == "__main__":
    main()
