"""Search for a mixture of experts: a small Vision Transformer, and a movie recommender.

How many experts, how wide, how many per token, or none at all? keras-tuner searches two models of
keras_moe on real data, each with a training, a validation and a test split:

- a Vision Transformer on scikit-learn's 8 x 8 digits, whose feed-forward is dense, `SoftMoE`, `MoE`
  or `SwitchFFN`;
- the movie recommender of `movies.py`, an `MMoE` under three tasks, as a Keras 3 model.

    python examples/studies/tune.py
    python examples/studies/tune.py --search vit --tuner bayesian --trials 20
    python examples/studies/tune.py --search recommender --max-flops 60000
    KERAS_BACKEND=jax python examples/studies/tune.py --out results/studies/tune_jax

The trials compare models by a validation metric of a single training, so the luckiest of many wins.
What counts comes after: the best and the default hyperparameters are trained anew from the same
seeds, and differ on the test split by more than chance, or not.

It can be killed at any moment: the same command goes on, and repeats no trial that had ended. What
comes out, in `results/studies/tune`: `pareto.png`, the metric against the active FLOPs;
`figures.json`, the numbers; and a folder per search, with KerasTuner's files.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# JAX compiles equal models once: the same hyperparameters with other seeds, or in a later process.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.abspath("results/xla_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import keras
import numpy as np
from movielens.data import TEST, TRAIN, VALIDATION, load_movielens, split_by_time
from movielens.features import Examples, Past
from movielens.model import MIDDLE_RATING, TASKS, movie_features
from rich.console import Console
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from tuning import show
from tuning.compare import SEARCH_SEED, Run, default_values, train
from tuning.figures import draw
from tuning.search import TUNERS, Figure, Search, claim, run_trials, write_whole

from keras_moe.tuning import ActiveCost, HyperMMoERecommender, HyperViTMoE

MOVIES = Path(__file__).parents[1] / "data" / "ml-latest-small"
HELD_OUT = 360  # digits to validate on, and as many to test on
NEGATIVES_EACH = 1  # sampled unwatched movies per watched one
COLOURED_BY = {"vit": "feed_forward", "recommender": "mmoe/num_experts"}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Search a Vision Transformer and a recommender with mixtures of experts."
    )
    parser.add_argument("--search", choices=["vit", "recommender", "both"], default="both")
    parser.add_argument("--tuner", choices=list(TUNERS), default="random")
    parser.add_argument(
        "--trials",
        type=positive,
        default=8,
        help="of each search, those of earlier runs included; Hyperband counts each round of a "
        "candidate (default: 8)",
    )
    parser.add_argument(
        "--seeds",
        type=positive,
        default=3,
        help="trainings of the best and of the default, to compare them (default: 3)",
    )
    parser.add_argument(
        "--max-flops",
        type=positive,
        help="fail a trial whose model has more active FLOPs per example, without training it",
    )
    parser.add_argument("--out", type=Path, default=Path("results/studies/tune"))
    parser.add_argument(
        "--overwrite", action="store_true", help="delete an earlier search in --out"
    )
    parser.add_argument(
        "--quick", action="store_true", help="few examples, 2 epochs: see that it runs"
    )
    return parser.parse_args(arguments)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more. Received: {value}")
    return value


def digits_search(options: argparse.Namespace) -> Search:
    """Describe the search for a Vision Transformer that reads digits."""
    images, labels = load_digits(return_X_y=True)
    images = (images / 16).astype("float32").reshape(-1, 8, 8, 1)
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=HELD_OUT, stratify=labels, random_state=0
    )
    training, validation = train_test_split(
        rest, test_size=HELD_OUT, stratify=labels[rest], random_state=0
    )
    if options.quick:
        training = training[:256]
    depth = 1 if options.quick else 2
    batch_size = even_batches(len(training), 64)
    training = training[: len(training) // batch_size * batch_size]

    def hypermodel(seed: int) -> HyperViTMoE:
        return HyperViTMoE(
            (8, 8, 1),
            num_classes=10,
            patch_size=2,
            width=(32, 16, 64),
            depth=depth,
            num_heads=4,
            mlp_dim=(128, 64, 256),
            moe_layers=depth,  # every depth-th block: the last one
            soft_moe={"num_experts": (16, 4)},
            moe={
                "num_experts": (8, 4),
                "top_k": (2, 1),
                "capacity_factor": None,
                "balance_weight": 0.01,
            },
            switch={"num_experts": (8, 4), "capacity_factor": 1.25, "balance_weight": 0.01},
            learning_rate=(0.003, 0.001, 0.01),
            seed=seed,
        )

    return Search(
        name="vit",
        title="ViT on digits",
        hypermodel=hypermodel,
        objective=ActiveCost("val_accuracy", "max", max_flops=options.max_flops),
        metric=Figure("val_accuracy", "validation accuracy"),
        fit={
            "x": images[training],
            "y": labels[training],
            "validation_data": (images[validation], labels[validation]),
            "epochs": 2 if options.quick else 10,
            "batch_size": batch_size,
            "validation_batch_size": HELD_OUT,
        },
        test={"x": images[test], "y": labels[test], "batch_size": HELD_OUT},
        figures=(Figure("accuracy", "Accuracy"),),
    )


def movies_search(options: argparse.Namespace) -> Search:
    """Describe the search for a recommender: will they watch it, like it, and how many stars?

    The split, the features and the sampled negatives are those of `movies.py`: nothing a
    model sees is of its example's moment or later.
    """
    data = load_movielens(MOVIES, max_users=40 if options.quick else None)
    past = Past(data, split_by_time(data))

    def arrays(period: int, at_most: int) -> tuple[tuple, int]:
        examples = past.with_negatives(period, NEGATIVES_EACH, seed=period)
        batch_size = even_batches(len(examples), at_most)
        order = np.random.default_rng(period).permutation(len(examples))
        rows = examples[order[: len(examples) // batch_size * batch_size]]
        return (past.features(rows), rows.labels(), mean_weights(rows)), batch_size

    training, batch_size = arrays(TRAIN, 2048)
    validation, validation_batch = arrays(VALIDATION, 8192)
    test, test_batch = arrays(TEST, 8192)
    features = movie_features(
        num_users=data.num_users,
        num_movie_rows=past.num_embedding_rows,
        num_genres=len(data.genre_names),
        scalar_mean=training[0]["scalars"].mean(0),
        scalar_variance=training[0]["scalars"].var(0),
    )

    def hypermodel(seed: int) -> HyperMMoERecommender:
        return HyperMMoERecommender(
            features,
            TASKS,
            interactions=[("user", "movie"), ("recent", "movie"), ("recent_liked", "movie")],
            shared_units=(64, 32, 128),
            mmoe={"num_experts": (4, 2, 8), "expert_units": (32, 16, 64), "gate_dropout": 0.0},
            tower_units=16,
            dropout=(0.2, 0.1, 0.3),
            embedding_l2=(1e-4, 1e-5),
            initial_predictions={"rating": MIDDLE_RATING},
            learning_rate=(0.004, 0.002, 0.008),
            seed=seed,
        )

    # Without the penalties in "val_loss", which differ between trials for other reasons.
    losses = hypermodel(SEARCH_SEED).task_losses
    objective = ActiveCost(losses, "min", max_flops=options.max_flops)
    return Search(
        name="recommender",
        title="Movie recommender",
        hypermodel=hypermodel,
        objective=objective,
        metric=Figure(objective.name, "validation loss, mean of tasks", higher_is_better=False),
        fit={
            **dict(zip(("x", "y", "sample_weight"), training, strict=True)),
            "validation_data": validation,
            "epochs": 2 if options.quick else 3,
            "batch_size": batch_size,
            "validation_batch_size": validation_batch,
        },
        test={
            **dict(zip(("x", "y", "sample_weight"), test, strict=True)),
            "batch_size": test_batch,
        },
        figures=(
            Figure("engagement_auc", "Engagement AUC"),
            Figure("liked_auc", "Liked AUC"),
            Figure("rating_rmse", "Rating RMSE", higher_is_better=False),
        ),
    )


def even_batches(examples: int, at_most: int) -> int:
    """Return a batch size that leaves over fewer examples than there are batches.

    XLA compiles a program for each batch size that it meets, the last one's too.
    """
    return examples // -(-examples // at_most)


def mean_weights(examples: Examples) -> dict[str, np.ndarray]:
    """Return each task's mask, so that its loss is the mean over the examples that have a label."""
    weights = examples.sample_weights()
    return {task: weight / max(weight.mean(), 1e-6) for task, weight in weights.items()}


SEARCHES = {"vit": digits_search, "recommender": movies_search}


def run(search: Search, options: argparse.Namespace) -> dict[str, Any]:
    """Search, compare the best with the default, and return what came out."""
    show.console.rule(search.title)
    folder, epochs = options.out / search.name, search.fit["epochs"]
    compiled: dict[str, keras.Model] = {}
    with show.progress_bar("default", 1, epochs) as progress:
        values = default_values(search)
        trained = train(search, folder, values, SEARCH_SEED, progress, compiled)
        default = trained.as_row(show.DEFAULT)
    with show.progress_bar("trial", options.trials, epochs) as progress:
        rows = [default, *run_trials(search, options.out, options.tuner, options.trials, progress)]
    show.trials(search, rows)

    runs: dict[str, list[Run]] = {"best": [], "default": []}
    best = show.best_of(search, rows)
    if best is None:
        show.console.print("No trial was completed: there is nothing to compare with the default.")
        return {"search": search, "rows": rows, "runs": runs}
    with show.progress_bar("training", 2 * options.seeds, epochs) as progress:
        for index in range(options.seeds):
            seed = SEARCH_SEED + 1 + index
            for place, (name, row) in enumerate((("best", best), ("default", default))):
                progress(trial=2 * index + place, epoch=0)
                runs[name].append(train(search, folder, row.values, seed, progress, compiled))
    show.comparison(search, runs["best"], runs["default"])
    return {"search": search, "rows": rows, "runs": runs}


def main(arguments: list[str] | None = None) -> int:
    began = time.perf_counter()
    options = parse_arguments(arguments)
    names = list(SEARCHES) if options.search == "both" else [options.search]
    searches = [SEARCHES[name](options) for name in names]
    try:
        for search in searches:
            claim(search, options.out, options.tuner, options.overwrite)
    except ValueError as error:
        message = f"error: {error}\nHere: give another --out, or --overwrite to delete it."
        Console(stderr=True, soft_wrap=True, markup=False).print(message)
        return 2
    show.console.print(f"keras_moe on {keras.backend.backend()}, {options.tuner} search")
    found = [run(search, options) for search in searches]
    draw(
        [(each["search"], each["rows"], COLOURED_BY[each["search"].name]) for each in found],
        options.out / "pareto.png",
    )
    write_whole(options.out / "figures.json", show.as_record(found))
    show.ending(options.out / "pareto.png", time.perf_counter() - began)
    return 0


if __name__ == "__main__":
    sys.exit(main())
