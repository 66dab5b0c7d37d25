"""The two rankers, as Keras 3 functional models: shared bottom, and MMoE.

Nothing here knows of tensorflow-recommenders; `recommend_movies.py` puts these models in one.
"""

from __future__ import annotations

import keras
import numpy as np
from keras import layers, ops

from keras_moe.layers import MMoE
from movielens.features import RECENT

TASKS = {"engagement": "sigmoid", "liked": "sigmoid", "rating": None}
MIDDLE_RATING = 3.5  # stars, where the rating tower starts


def build_ranker(
    trunk: str,
    *,
    num_users: int,
    num_movie_rows: int,
    num_genres: int,
    scalar_mean: np.ndarray,
    scalar_variance: np.ndarray,
    num_experts: int = 4,
    expert_units: int = 32,
    shared_units: int = 64,
    bottom_units: int | None = None,
    tower_units: int = 16,
    embedding_dim: int = 8,
    dropout: float = 0.2,
    embedding_l2: float = 1e-4,
    gate_dropout: float = 0.0,
    seed: int = 0,
) -> keras.Model:
    """Build a ranker: embeddings, a shared hidden layer, the trunk, one tower per task.

    Args:
        trunk: `"mmoe"` for experts mixed by one gate per task, `"shared_bottom"` for one wider
            hidden layer that all towers read.
        num_users: Users in the data.
        num_movie_rows: Rows of the movie embedding; row 0 is padding.
        num_genres: Genres in the data.
        scalar_mean: `(scalars,)`, mean of the training examples' scalar features.
        scalar_variance: `(scalars,)`, their variance.
        num_experts: Experts of the MMoE. Defaults to 4.
        expert_units: Width of each expert. Defaults to 32.
        shared_units: Width of the hidden layer under the trunk. Defaults to 64.
        bottom_units: Width of the shared bottom. Defaults to None, which takes the width that
            gives as many parameters as the MMoE.
        tower_units: Width of each task's tower. Defaults to 16.
        embedding_dim: Width of the user, movie and genre vectors. Defaults to 8.
        dropout: Rate after the shared hidden layer and on the embeddings. Defaults to 0.2.
        embedding_l2: L2 penalty of the user and movie embeddings. Defaults to 1e-4.
        gate_dropout: Rate at which training drops an expert from a gate. Defaults to 0.
        seed: Seed of the initial weights and of dropout. Defaults to 0.

    Returns:
        A model from a dict of features to a dict of (batch, 1) predictions, one per task.
    """
    if trunk not in ("mmoe", "shared_bottom"):
        raise ValueError(f'`trunk` must be "mmoe" or "shared_bottom". Received: trunk={trunk!r}')
    keras.utils.set_random_seed(seed)

    def embedding(rows: int, name: str) -> layers.Embedding:
        penalty = keras.regularizers.L2(embedding_l2)
        return layers.Embedding(rows, embedding_dim, embeddings_regularizer=penalty, name=name)

    inputs = {
        "user": keras.Input((), dtype="int32", name="user"),
        "movie": keras.Input((), dtype="int32", name="movie"),
        "year": keras.Input((), dtype="int32", name="year"),
        "genres": keras.Input((num_genres,), name="genres"),
        "recent": keras.Input((RECENT,), dtype="int32", name="recent"),
        "recent_liked": keras.Input((RECENT,), dtype="int32", name="recent_liked"),
        "genre_share": keras.Input((num_genres,), name="genre_share"),
        "genre_liking": keras.Input((num_genres,), name="genre_liking"),
        "scalars": keras.Input((len(scalar_mean),), name="scalars"),
    }
    drop = layers.Dropout(dropout, seed=seed, name="embedding_dropout")
    of_movie = embedding(num_movie_rows, "movie_embedding")
    user = drop(embedding(num_users, "user_embedding")(inputs["user"]))
    movie = drop(of_movie(inputs["movie"]))
    recent = drop(mean_of_known(of_movie(inputs["recent"]), inputs["recent"]))
    liked = drop(mean_of_known(of_movie(inputs["recent_liked"]), inputs["recent_liked"]))
    scalars = layers.Normalization(mean=scalar_mean, variance=scalar_variance, name="standardize")(
        inputs["scalars"]
    )
    features = [
        user,
        movie,
        recent,
        liked,
        user * movie,
        recent * movie,
        liked * movie,
        layers.Embedding(30, 4, name="year_embedding")(inputs["year"]),
        layers.Dense(embedding_dim, use_bias=False, name="genre_embedding")(inputs["genres"]),
        inputs["genre_share"],
        inputs["genre_liking"],
        scalars,
    ]
    shared = layers.Concatenate(name="features")(features)
    shared = layers.Dense(shared_units, activation="relu", name="shared_hidden")(shared)
    shared = layers.Dropout(dropout, seed=seed + 1, name="shared_dropout")(shared)
    if trunk == "mmoe":
        mmoe = MMoE(
            num_experts,
            expert_units=[expert_units],
            tasks=list(TASKS),
            gate_dropout=gate_dropout,
            seed=seed,
            name="mmoe",
        )
        # With the routing already here: Keras 3.15 cannot build a model on a later call of a layer
        # that returns more than its first call did, and `build_gates` makes such a call.
        mixed, _ = mmoe(shared, return_routing=True)
    else:
        if bottom_units is None:
            bottom_units = equal_bottom_units(num_experts, expert_units, shared_units, tower_units)
        bottom = layers.Dense(bottom_units, activation="relu", name="shared_bottom")(shared)
        mixed = dict.fromkeys(TASKS, bottom)
    outputs = {}
    for task, activation in TASKS.items():
        tower = layers.Dense(tower_units, activation="relu", name=f"{task}_tower")(mixed[task])
        start = MIDDLE_RATING if task == "rating" else 0.0
        outputs[task] = layers.Dense(
            1,
            activation=activation,
            bias_initializer=keras.initializers.Constant(start),
            name=task,
        )(tower)
    return keras.Model(inputs, outputs, name=trunk)


def mean_of_known(vectors, rows):
    """Average a history's vectors (batch, recent, dim) over the rows that are not padding."""
    known = ops.expand_dims(ops.cast(ops.not_equal(rows, 0), vectors.dtype), -1)
    return ops.sum(vectors * known, axis=1) / ops.maximum(ops.sum(known, axis=1), 1.0)


def equal_bottom_units(
    num_experts: int, expert_units: int, shared_units: int, tower_units: int
) -> int:
    """Return the width of a shared bottom with as many parameters as MMoE and its towers."""
    tasks = len(TASKS)
    experts = num_experts * (shared_units + 1) * expert_units + tasks * shared_units * num_experts
    mmoe = experts + tasks * expert_units * tower_units
    return round(mmoe / (shared_units + 1 + tasks * tower_units))


def count_dense_parameters(model: keras.Model) -> int:
    """Count trainable parameters outside the embeddings, which both models share."""
    return sum(
        layer.count_params()
        for layer in model.layers
        if not isinstance(layer, (layers.Embedding, layers.Normalization))
    )


def build_gates(ranker: keras.Model) -> keras.Model:
    """Return a model from the MMoE ranker's inputs to its gate weights (batch, tasks, experts)."""
    mmoe = ranker.get_layer("mmoe")
    _, routing = mmoe(mmoe.input, return_routing=True)
    return keras.Model(ranker.input, routing.weights, name="gates")
