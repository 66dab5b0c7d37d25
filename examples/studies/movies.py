"""Recommend movies: will this user watch it, and will they like it?

A ranker in the manner of "Recommending What Video to Watch Next: A Multitask Ranking System"
(Zhao et al., RecSys 2019), on MovieLens: one network learns engagement (will this user watch this
movie) and satisfaction (liked, that is 4 stars or more; and the rating). Features of the user's
past, the movie's genres and year and the time go into a shared hidden layer; a Multi-gate
Mixture-of-Experts (MMoE) mixes experts for each task; a tower per task predicts. A shared-bottom
network with as many parameters, trained on the same examples with the same seeds, shows what the
experts are worth. The training loop is a `tfrs.Model` of TensorFlow Recommenders.

    python examples/studies/movies.py                       # the data beside the examples
    python examples/studies/movies.py --data ~/ml-25m --limit 20000
    python examples/studies/movies.py --user 599 --seeds 5

What comes out, in `results/studies/movies`: `report.html`, one file with everything printed here
and pictures; `mmoe_ranker.keras`, the model; `figures.json`, the numbers.

The data, in `examples/data`, is ml-latest-small of GroupLens, under the terms in
`ml-latest-small/README.txt` there (research use, acknowledgement, no commercial use without
permission): F. Maxwell Harper and Joseph A. Konstan. 2015. The MovieLens Datasets: History and
Context. ACM Transactions on Interactive Intelligent Systems (TiiS) 5, 4: 19:1-19:19.
https://doi.org/10.1145/2827872
"""

from __future__ import annotations

import os

# TensorFlow Recommenders needs Keras 2, the layers of keras_moe need Keras 3: `KerasBridge` joins
# them, if these are set before anything of Keras is imported.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
import tensorflow as tf
import tensorflow_recommenders as tfrs
import tf_keras
from movielens import show
from movielens.baselines import measure_baselines
from movielens.data import (
    ACKNOWLEDGEMENT,
    TEST,
    TRAIN,
    VALIDATION,
    DataError,
    MovieLens,
    load_movielens,
    split_by_time,
)
from movielens.features import Examples, Past, batches
from movielens.figures import FIGURES, compare, measure
from movielens.model import TASKS, build_ranker, count_dense_parameters, movie_features
from movielens.report import write_report
from rich.console import Console

from keras_moe.integrations.tfrs import KerasBridge
from keras_moe.models import task_gates

SHIPPED_DATA = Path(__file__).parents[1] / "data" / "ml-latest-small"
NEGATIVES_EACH = 4  # sampled unwatched movies per watched one
TEST_SEED, VALIDATION_SEED = 2_000_003, 1_000_003  # of the negatives, the same for all models
EVALUATION_BATCH = 8192
LEARNING_RATE = 4e-3
COMPARED = ("mmoe", "shared_bottom")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Multi-task movie ranking with MMoE: engagement and satisfaction.",
        epilog=f"Data: {ACKNOWLEDGEMENT}",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=SHIPPED_DATA,
        help="a MovieLens folder: ml-latest(-small), ml-25m, ml-32m, ml-1m or ml-10m "
        "(default: the ml-latest-small in examples/data)",
    )
    parser.add_argument("--epochs", type=positive, default=8, help="at most (default: 8)")
    parser.add_argument("--batch-size", type=positive, default=4096, help="(default: 4096)")
    parser.add_argument("--experts", type=positive, default=4, help="of the MMoE (default: 4)")
    parser.add_argument("--seeds", type=positive, default=3, help="runs per model (default: 3)")
    parser.add_argument("--user", type=int, help="userId to recommend to (default: who rated most)")
    parser.add_argument("--out", type=Path, default=Path("results/studies/movies"))
    parser.add_argument(
        "--limit", type=positive, help="keep this many users, drawn at random (default: all)"
    )
    parser.add_argument(
        "--quick", action="store_true", help="60 users, 2 epochs, 1 seed: see that it runs"
    )
    options = parser.parse_args(arguments)
    if options.quick:
        options.limit, options.epochs, options.seeds = options.limit or 60, 2, 1
    return options


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more. Received: {value}")
    return value


@dataclass
class Setting:
    """What all trainings share: data, split, features, examples."""

    options: argparse.Namespace
    data: MovieLens
    past: Past
    validation: Examples
    test: Examples
    scalar_mean: np.ndarray
    scalar_variance: np.ndarray


@dataclass
class Run:
    """One trained model and its figures on the test period."""

    trunk: str
    seed: int
    ranker: keras.Model
    recommender: tfrs.Model
    history: dict[str, list[float]]
    chosen_epoch: int
    figures: dict[str, float]
    predictions: dict[str, np.ndarray] = field(repr=False)


def prepare(options: argparse.Namespace, data: MovieLens) -> Setting:
    """Split by time, then fix the validation and test examples that every model meets."""
    past = Past(data, split_by_time(data))
    training = past.with_negatives(TRAIN, NEGATIVES_EACH, seed=0)
    sample = np.random.default_rng(0).permutation(len(training))[:200_000]
    scalars = past.features(training[sample])["scalars"]
    return Setting(
        options=options,
        data=data,
        past=past,
        validation=past.with_negatives(VALIDATION, NEGATIVES_EACH, seed=VALIDATION_SEED),
        test=past.with_negatives(TEST, NEGATIVES_EACH, seed=TEST_SEED),
        scalar_mean=scalars.mean(0),
        scalar_variance=scalars.var(0),
    )


class MovieRecommender(tfrs.Model):
    """A Keras 3 ranker trained on three `tfrs` tasks at once."""

    def __init__(self, ranker: keras.Model, **kwargs: Any):
        super().__init__(**kwargs)
        self.bridge = KerasBridge(ranker)
        self.engagement = tfrs.tasks.Ranking(
            loss=tf_keras.losses.BinaryCrossentropy(),
            metrics=[tf_keras.metrics.AUC(name="engagement")],
        )
        self.liked = tfrs.tasks.Ranking(
            loss=tf_keras.losses.BinaryCrossentropy(),
            metrics=[tf_keras.metrics.AUC(name="liked")],
        )
        self.rating = tfrs.tasks.Ranking(
            loss=tf_keras.losses.MeanSquaredError(),
            metrics=[tf_keras.metrics.RootMeanSquaredError(name="rating")],
        )
        # The "loss" that tfrs.Model logs is that of the last batch only; this is the mean.
        self.objective = tf_keras.metrics.Mean(name="objective")

    def call(self, features: dict[str, tf.Tensor], training: bool = False) -> dict[str, tf.Tensor]:
        return self.bridge(features, training=training)

    def get_config(self) -> dict[str, Any]:
        return {"ranker": keras.saving.serialize_keras_object(self.bridge.layer)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> MovieRecommender:
        return cls(keras.saving.deserialize_keras_object(config["ranker"]))

    def compute_loss(self, inputs: dict, training: bool = False) -> tf.Tensor:
        labels, weights = inputs["labels"], inputs["weights"]
        predictions = self(inputs["features"], training=training)
        total = 0.0
        for task in TASKS:
            # Each task averages over the examples that have its label, not over the whole batch.
            mask = weights[task] / tf.maximum(tf.reduce_mean(weights[task]), 1e-6)
            total += getattr(self, task)(
                labels=labels[task][:, None],
                predictions=predictions[task],
                sample_weight=mask[:, None],
                training=training,
            )
        self.objective.update_state(total, sample_weight=tf.shape(labels["liked"])[0])
        return total


def train(setting: Setting, trunk: str, seed: int) -> Run:
    """Train one model, keep its best validation epoch, measure it on the test period."""
    options = setting.options
    ranker = build(setting, trunk, seed)
    recommender = MovieRecommender(ranker)
    recommender.compile(optimizer=tf_keras.optimizers.Adam(LEARNING_RATE))
    show.training_begins(trunk, seed, ranker.count_params(), count_dense_parameters(ranker))
    positives = setting.past.ratings(TRAIN)
    num_examples = len(positives) + NEGATIVES_EACH * int(positives.in_catalogue.sum())
    history = recommender.fit(
        as_dataset(lambda: training_batches(setting, seed), setting),
        steps_per_epoch=max(1, num_examples // options.batch_size),
        epochs=options.epochs,
        validation_data=validation_dataset(setting).cache(),
        callbacks=[
            tf_keras.callbacks.EarlyStopping("val_objective", patience=2, restore_best_weights=True)
        ],
        verbose=1 if sys.stdout.isatty() else 2,
    ).history
    predictions = predict(setting, recommender, setting.test)
    return Run(
        trunk=trunk,
        seed=seed,
        ranker=ranker,
        recommender=recommender,
        history=history,
        chosen_epoch=int(np.argmin(history["val_objective"])),
        figures=measure(setting.test, **predictions),
        predictions=predictions,
    )


def build(setting: Setting, trunk: str, seed: int) -> keras.Model:
    described = movie_features(
        num_users=setting.data.num_users,
        num_movie_rows=setting.past.num_embedding_rows,
        num_genres=len(setting.data.genre_names),
        scalar_mean=setting.scalar_mean,
        scalar_variance=setting.scalar_variance,
    )
    return build_ranker(trunk, described, num_experts=setting.options.experts, seed=seed)


def training_batches(setting: Setting, seed: int) -> Iterator[dict]:
    """Yield batches without end; every epoch draws new negatives, the same for both models."""
    epoch = 0
    while True:
        examples = setting.past.with_negatives(TRAIN, NEGATIVES_EACH, seed=1000 * seed + epoch)
        batch_size = setting.options.batch_size
        yield from batches(setting.past, examples, batch_size, seed=1000 * seed + epoch)
        epoch += 1


def evaluation_dataset(setting: Setting, examples: Examples) -> tf.data.Dataset:
    return as_dataset(lambda: batches(setting.past, examples, EVALUATION_BATCH), setting)


def validation_dataset(setting: Setting) -> tf.data.Dataset:
    """Shuffled, so that every batch has a rating to judge and the mean over batches is fair."""
    validation, size = setting.validation, EVALUATION_BATCH
    return as_dataset(lambda: batches(setting.past, validation, size, seed=0), setting)


def as_dataset(generate, setting: Setting) -> tf.data.Dataset:
    example = next(batches(setting.past, setting.test[:1], 1))
    signature = tf.nest.map_structure(
        lambda x: tf.TensorSpec((None, *x.shape[1:]), x.dtype), example
    )
    return tf.data.Dataset.from_generator(generate, output_signature=signature).prefetch(4)


def predict(setting: Setting, recommender: tfrs.Model, examples: Examples) -> dict[str, np.ndarray]:
    """Return each task's prediction for every example."""
    features = evaluation_dataset(setting, examples).map(lambda batch: batch["features"])
    predictions = recommender.predict(features, verbose=0)
    return {task: predictions[task][:, 0] for task in TASKS}


def choose_user(data: MovieLens, user_id: int | None) -> int:
    """Return the index of the user asked for, or of the one with the most ratings."""
    if user_id is None:
        return int(np.argmax(np.bincount(data.user)))
    found = np.flatnonzero(data.user_ids == user_id)
    if not len(found):
        raise DataError(
            f"there is no user {user_id}. The ids go from {data.user_ids[0]} to "
            f"{data.user_ids[-1]}; who rated most is {data.user_ids[choose_user(data, None)]}."
        )
    return int(found[0])


@dataclass
class Recommendation:
    """A movie for a user, and what became of it in the test period."""

    title: str
    genres: str
    score: float
    watch: float
    liked: float
    rating: float
    given: float | None  # stars that the user gave it in the test period, if any


@dataclass
class TopList:
    """What one model would show a user when their test period begins."""

    movies: list[Recommendation]
    num_candidates: int
    num_watched: int  # of the candidates, in the test period


def recommend(setting: Setting, run: Run, user: int, length: int = 10) -> TopList:
    """Rank all movies that the user has not watched yet, at the moment the test period begins.

    The tasks are combined as in the paper, by a weighted product, here with all weights 1:
    score = P(watch) * P(liked) * rating / 5.
    """
    data, past = setting.data, setting.past
    begin, now, moment = user_moment(setting, user)
    candidates = np.setdiff1d(past.catalogue(moment), data.movie[begin:now])
    repeated = np.ones(len(candidates), np.int64)
    examples = Examples(
        user=user * repeated,
        movie=candidates,
        timestamp=moment * repeated,
        past=now * repeated,
        watched=0 * repeated,
        in_catalogue=repeated,
        rating=0.0 * repeated,
    )
    predicted = predict(setting, run.recommender, examples)
    score = predicted["engagement"] * predicted["liked"] * predicted["rating"] / 5
    future = slice(now, past.start[user + 1])
    given = dict(zip(data.movie[future], data.rating[future], strict=True))
    movies = [
        Recommendation(
            title=data.titles[movie],
            genres=genres_of(data, movie),
            score=float(score[place]),
            watch=float(predicted["engagement"][place]),
            liked=float(predicted["liked"][place]),
            rating=float(np.clip(predicted["rating"][place], 0.5, 5)),
            given=given.get(movie),
        )
        for place in np.argsort(-score, kind="stable")[:length]
        for movie in [candidates[place]]
    ]
    return TopList(movies, len(candidates), int(np.isin(candidates, list(given)).sum()))


def user_moment(setting: Setting, user: int) -> tuple[int, int, int]:
    """Return where the user's ratings begin, where their test period does, and when that is."""
    data, past = setting.data, setting.past
    begin, end = past.start[user], past.start[user + 1]
    now = begin + int(np.sum(past.period[begin:end] != TEST))
    moment = data.timestamp[now] if now < end else data.timestamp[end - 1] + 1
    return int(begin), int(now), int(moment)


def favourites_of(setting: Setting, user: int, length: int = 10) -> list[tuple[str, str, float]]:
    """Return title, genres and stars of what the user liked most before their test period."""
    data = setting.data
    begin, now, _ = user_moment(setting, user)
    best = begin + np.lexsort((-data.timestamp[begin:now], -data.rating[begin:now]))[:length]
    return [
        (data.titles[data.movie[row]], genres_of(data, data.movie[row]), float(data.rating[row]))
        for row in best
    ]


def genres_of(data: MovieLens, movie: int) -> str:
    return ", ".join(np.array(data.genre_names)[data.movie_genres[movie] > 0])


@dataclass
class GateUse:
    """How the gates of an MMoE spread their weight over the experts, on the test examples."""

    mean: np.ndarray  # (tasks, experts)
    low: np.ndarray  # 10th percentile over examples
    high: np.ndarray  # 90th percentile
    largest: np.ndarray  # (tasks, experts) share of examples whose largest weight this is
    effective: np.ndarray  # (tasks,) exp of the mean entropy: 1 to experts
    genre_names: list[str]
    by_genre: np.ndarray  # (genres, tasks, experts)


def measure_gates(setting: Setting, run: Run) -> GateUse:
    """Run the gates over the test examples."""
    gates = task_gates(run.ranker)
    test = setting.test[np.flatnonzero(setting.test.in_catalogue)]
    parts = [
        gates.predict_on_batch(batch["features"])
        for batch in batches(setting.past, test, EVALUATION_BATCH)
    ]
    weights = np.concatenate(parts)
    genres = setting.data.movie_genres[test.movie]
    common = np.argsort(-genres.sum(0))[: int((genres.sum(0) >= 20).sum())]
    entropy = -np.sum(weights * np.log(weights + 1e-12), axis=-1)
    experts = np.arange(weights.shape[-1])
    return GateUse(
        mean=weights.mean(0),
        low=np.percentile(weights, 10, axis=0),
        high=np.percentile(weights, 90, axis=0),
        largest=(weights.argmax(-1)[..., None] == experts).mean(0),
        effective=np.exp(entropy.mean(0)),
        genre_names=[setting.data.genre_names[genre] for genre in common],
        by_genre=np.stack([weights[genres[:, genre] > 0].mean(0) for genre in common]),
    )


def save_and_reload(setting: Setting, run: Run, folder: Path) -> float:
    """Save the model, load it, and return by how much the predictions differ at most.

    Twice: the `tfrs.Model` with its optimizer, and the Keras 3 model alone, which needs neither
    TensorFlow Recommenders nor this script to load, and runs on JAX and PyTorch too.
    """
    whole_file, ranker_file = folder / "recommender_tfrs.keras", folder / "mmoe_ranker.keras"
    run.recommender.save(whole_file)
    run.ranker.save(ranker_file)
    custom = {"MovieRecommender": MovieRecommender}
    whole = tf_keras.models.load_model(whole_file, custom_objects=custom)
    alone = MovieRecommender(keras.saving.load_model(ranker_file))
    difference = 0.0
    for file, loaded in ((whole_file, whole), (ranker_file, alone)):
        predictions = predict(setting, loaded, setting.test)
        worst = max(
            float(np.abs(predictions[task] - run.predictions[task]).max()) for task in TASKS
        )
        show.reloaded(file, worst)
        difference = max(difference, worst)
    return difference


def main(arguments: list[str] | None = None) -> int:
    began = time.perf_counter()
    options = parse_arguments(arguments)
    try:
        data = load_movielens(options.data, max_users=options.limit)
        user = choose_user(data, options.user)
    except DataError as error:
        Console(stderr=True, soft_wrap=True, markup=False).print(f"error: {error}")
        return 2
    show.introduction(options.data)
    setting = prepare(options, data)
    show.split(setting)

    runs = [train(setting, trunk, seed) for seed in range(options.seeds) for trunk in show.NAMES]
    baselines = measure_baselines(setting.past, setting.validation, setting.test)
    by_trunk = {trunk: [run for run in runs if run.trunk == trunk] for trunk in show.NAMES}
    verdicts = [
        compare(figure, *([run.figures[figure.task] for run in by_trunk[t]] for t in COMPARED))
        for figure in FIGURES
    ]
    show.figures(by_trunk, baselines, verdicts)

    mmoe, shared_bottom = by_trunk["mmoe"][0], by_trunk["shared_bottom"][0]
    lists = {run.trunk: recommend(setting, run, user) for run in (mmoe, shared_bottom)}
    favourites = favourites_of(setting, user)
    show.recommendations(data.user_ids[user], favourites, lists)
    gate_use = measure_gates(setting, mmoe)
    show.gates(gate_use)

    options.out.mkdir(parents=True, exist_ok=True)
    difference = save_and_reload(setting, mmoe, options.out)
    if difference > 1e-6:
        print("error: the reloaded model does not predict the same.", file=sys.stderr)
        return 1
    results = show.as_record(by_trunk, baselines, verdicts, gate_use)
    results["seconds"] = round(time.perf_counter() - began)
    (options.out / "figures.json").write_text(json.dumps(results, indent=2) + "\n")
    write_report(
        options.out / "report.html",
        setting=setting,
        by_trunk=by_trunk,
        results=results,
        user_id=int(data.user_ids[user]),
        favourites=favourites,
        lists=lists,
        gate_use=gate_use,
        command=" ".join(["python examples/studies/movies.py", *(arguments or sys.argv[1:])]),
    )
    show.ending(options.out / "report.html", time.perf_counter() - began)
    return 0


if __name__ == "__main__":
    sys.exit(main())
