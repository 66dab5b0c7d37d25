"""A recommender's ranking model: features, a shared layer, experts, a tower per task."""

import bisect
import inspect
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np
from keras import layers

from keras_moe.core import checks
from keras_moe.core.initializers import derived_seed
from keras_moe.core.types import Activation, Tensor
from keras_moe.layers import MMoE
from keras_moe.layers.expert_mlp import checked_units
from keras_moe.models._masked_model import MaskedModel
from keras_moe.models.features import Categorical, Feature, History

_TASK_ACTIVATIONS = {"binary": "sigmoid", "regression": "linear"}
_TRUNKS = ("mmoe", "shared_bottom")


def multitask_ranker(
    features: Sequence[Feature],
    tasks: Mapping[str, str],
    *,
    trunk: str | keras.layers.Layer = "mmoe",
    interactions: Sequence[tuple[str, str]] = (),
    shared_units: int | Sequence[int] = 64,
    num_experts: int = 4,
    expert_units: int | Sequence[int] = 32,
    tower_units: int | Sequence[int] = 16,
    activation: Activation = "relu",
    dropout: float = 0.2,
    gate_dropout: float = 0.0,
    embedding_l2: float = 1e-4,
    initial_predictions: Mapping[str, float] | None = None,
    seed: int | None = None,
    name: str | None = None,
) -> keras.Model:
    """Builds a multi-task ranker, a functional model from a dict of features to one of predictions.

    x       = shared(concat(vectors of the features, products of the interactions))
    mixed_t = sum_e gate_t(x)[e] expert_e(x)         (or one bottom(x) for all tasks)
    y_t     = activation_t(tower_t(mixed_t) @ w_t + b_t)

    Args:
        features: Sequence of `keras_moe.models.features` records: `Categorical`, `History`,
            `MultiHot`, `Numeric`.
        tasks: Dict of task names to kinds: `"binary"`, a probability by a sigmoid, or
            `"regression"`, a number. Layers carry the names: letters from a to z, digits, `_` and
            `-`.
        trunk: `"mmoe"`, experts mixed by one gate per task, or `"shared_bottom"`, the baseline: as
            many hidden layers as an expert has, read by all towers, of such a width that the model
            has as many parameters as with `"mmoe"`; or a layer that gives a dict of the tasks'
            vectors, such as `keras_moe.layers.PLE(32, tasks=["watched", "rating"])`, beside which
            `num_experts`, `expert_units` and `gate_dropout` are not given. Defaults to `"mmoe"`.
        interactions: Pairs of names of features whose vectors are multiplied entry by entry, as in
            matrix factorisation. Defaults to `()`.
        shared_units: Positive integer or a sequence of them, the width of each hidden layer under
            the trunk; empty for none. Defaults to `64`.
        num_experts: Positive integer, the number of experts E. Defaults to `4`.
        expert_units: Positive integer or a sequence of them, the width of each expert layer.
            Defaults to `32`.
        tower_units: Positive integer or a sequence of them, the width of each hidden layer of a
            task's tower; empty for none. Defaults to `16`.
        activation: Activation of all hidden layers. Defaults to `"relu"`.
        dropout: Float in [0, 1), dropout of the embeddings and after each shared hidden layer.
            Defaults to `0.2`.
        gate_dropout: Float in [0, 1), the probability that in training an expert is left out of a
            gate, see `MMoE`. Defaults to `0.0`.
        embedding_l2: Number of at least 0, the L2 penalty of embedding tables. It reads and moves
            every row in every step: 0 for tables of millions of rows. Defaults to `1e-4`.
        initial_predictions: What a task predicts before training, up to its first random weights: a
            probability for a binary task, such as the share of clicks, or a number, such as the
            mean rating. Tasks left out start at 0.5 or 0. Defaults to `None`.
        seed: Optional integer, seed of the initial weights and of dropout; None for Keras's global
            one. With one seed, both trunks start with equal tables and shared layers. Defaults to
            `None`.
        name: Name of the model. Defaults to None, which takes the trunk's.

    Returns:
        A `keras.Model` from a dict of inputs by feature to a dict of float32 `(batch, 1)`
        predictions by task. The mixture is its layer `mmoe`, or the given one; `task_gates` shows
        the gates of an `MMoE`.

    Raises:
        ValueError: on names that repeat, are unknown or that a backend refuses, names that give two
            layers one name, an unknown task kind or trunk, vectors of an interaction that differ in
            width, or sizes that are not positive.

    Example:

    >>> from keras_moe.models import features, multitask_ranker
    >>> model = multitask_ranker(
    ...     [
    ...         features.Categorical("user", 1000),
    ...         features.Categorical("movie", 500),
    ...         features.History("recent", length=20, of="movie"),
    ...         features.MultiHot("genres", 19),
    ...     ],
    ...     {"watched": "binary", "rating": "regression"},
    ...     interactions=[("user", "movie"), ("recent", "movie")],
    ...     initial_predictions={"rating": 3.5},
    ... )
    >>> sorted(model.input), sorted(model.output)
    (['genres', 'movie', 'recent', 'user'], ['rating', 'watched'])

    Reference:
        Zhao et al. 2019, "Recommending What Video to Watch Next: A Multitask Ranking System",
        section 4.2 (a shared layer under the experts); Ma et al. 2018, "Modeling Task Relationships
        in Multi-task Learning with Multi-gate Mixture-of-Experts".
    """
    features = _checked_features(features)
    tasks = _checked_tasks(tasks, features)
    if isinstance(trunk, keras.layers.Layer):
        _check_alone(trunk, num_experts, expert_units, gate_dropout)
    else:
        checks.one_of("trunk", trunk, _TRUNKS)
    checks.positive_int("num_experts", num_experts)
    shared_widths = _optional_units("shared_units", shared_units)
    expert_widths = checked_units("expert_units", expert_units)
    tower_widths = _optional_units("tower_units", tower_units)
    dropout = checks.rate("dropout", dropout)
    gate_dropout = checks.rate("gate_dropout", gate_dropout)
    embedding_l2 = checks.non_negative("embedding_l2", embedding_l2)
    seed = checks.optional(checks.integer, "seed", seed)
    starts = _checked_starts(initial_predictions, tasks)

    make = _Layers(activation, dropout, seed)
    inputs = {feature.name: feature.input() for feature in features}
    x = _encoded(features, inputs, interactions, embedding_l2, make)
    for index, units in enumerate(shared_widths):
        x = make.hidden(units, "shared_hidden", index)(x)
        x = make.dropout(_numbered("shared_dropout", index))(x)

    if isinstance(trunk, keras.layers.Layer):
        mixed = trunk(x)
        if not isinstance(mixed, dict) or set(mixed) != set(tasks):
            checks.fail(
                f"`trunk` must give a dict of vectors by task, of {list(tasks)}.",
                outputs=list(mixed) if isinstance(mixed, dict) else type(mixed).__name__,
            )
    elif trunk == "mmoe":
        mixed = MMoE(
            num_experts,
            expert_widths,
            tasks=list(tasks),
            activation=activation,
            gate_dropout=gate_dropout,
            kernel_initializer=make.initializer("experts"),
            gate_initializer=make.initializer("gates"),
            seed=derived_seed(seed, "mmoe"),
            name="mmoe",
        )(x)
    else:
        read_by = len(tasks) * (tower_widths or (1,))[0]
        widths = _bottom_widths(x.shape[-1], len(tasks), num_experts, expert_widths, read_by)
        mixed = dict.fromkeys(tasks, _stack(x, widths, "shared_bottom", make))

    outputs = {
        task: _prediction(task, kind, mixed[task], tower_widths, starts[task], make)
        for task, kind in tasks.items()
    }
    _check_layer_names(outputs)
    named = trunk.name if isinstance(trunk, keras.layers.Layer) else trunk
    return MaskedModel(inputs, outputs, name=name or named)


def _check_alone(
    trunk: keras.layers.Layer, num_experts: int, expert_units: Any, gate_dropout: float
) -> None:
    """Fails where arguments describe experts that the layer brings itself."""
    given = {"num_experts": num_experts, "expert_units": expert_units, "gate_dropout": gate_dropout}
    defaults = inspect.signature(multitask_ranker).parameters
    for name, value in given.items():
        if value != defaults[name].default:
            checks.fail(
                f"`{name}` must be left out where `trunk` is a layer, which has its own.",
                trunk=type(trunk).__name__,
                **{name: value},
            )


class _Layers(NamedTuple):
    """Makes the layers of a ranker, whose seeds come from the model's and their names."""

    activation: Activation
    rate: float
    seed: int | None

    def initializer(self, name: str) -> keras.initializers.Initializer:
        return keras.initializers.GlorotUniform(derived_seed(self.seed, name))

    def dense(self, units: int, name: str, **arguments: Any) -> layers.Dense:
        initializer = self.initializer(name)
        return layers.Dense(units, kernel_initializer=initializer, name=name, **arguments)

    def hidden(self, units: int, name: str, index: int) -> layers.Dense:
        return self.dense(units, _numbered(name, index), activation=self.activation)

    def dropout(self, name: str) -> layers.Dropout:
        return layers.Dropout(self.rate, seed=derived_seed(self.seed, name), name=name)


def _encoded(
    features: Sequence[Feature],
    inputs: Mapping[str, Tensor],
    interactions: Sequence[tuple[str, str]],
    embedding_l2: float,
    make: _Layers,
) -> Tensor:
    """The vectors of all features and the products of some, in one row for each example."""
    tables = {
        feature.name: feature.table(embedding_l2, make.seed)
        for feature in features
        if isinstance(feature, Categorical)
    }
    vectors = {
        feature.name: feature.encode(inputs[feature.name], tables, make.seed)
        for feature in features
    }
    embedding_dropout = make.dropout("embedding_dropout")
    for feature in features:
        if _is_regularized(feature, features):
            vectors[feature.name] = embedding_dropout(vectors[feature.name])
    products = [_product(pair, vectors) for pair in interactions]
    return _concatenate([*vectors.values(), *products])


def _prediction(
    task: str, kind: str, x: Tensor, tower_widths: Sequence[int], start: float, make: _Layers
) -> Tensor:
    """The prediction of a task's tower, `(batch, 1)`."""
    hidden = _stack(x, tower_widths, f"{task}_tower", make)  # seeds are drawn in this order
    return make.dense(
        1,
        task,
        activation=_TASK_ACTIVATIONS[kind],
        bias_initializer=keras.initializers.Constant(start),
        dtype="float32",  # a probability near 1 has 2 digits in bfloat16
    )(hidden)


def _stack(x: Tensor, widths: Sequence[int], name: str, make: _Layers) -> Tensor:
    """Hidden layers, one after another."""
    for index, units in enumerate(widths):
        x = make.hidden(units, name, index)(x)
    return x


def _numbered(layer_name: str, index: int) -> str:
    return f"{layer_name}_{index}" if index else layer_name


def _is_regularized(feature: Feature, features: Sequence[Feature]) -> bool:
    """A history is regularized if its table is."""
    if isinstance(feature, History):
        (feature,) = (other for other in features if other.name == feature.of)
    return feature.is_regularized


def _product(pair: tuple[str, str], vectors: Mapping[str, Tensor]) -> Tensor:
    is_pair = isinstance(pair, Sequence) and not isinstance(pair, str) and len(pair) == 2
    if not is_pair or any(name not in vectors for name in pair):
        checks.fail(
            f"`interactions` must be pairs of names of features, of {sorted(vectors)}.",
            interaction=pair,
        )
    widths = tuple(vectors[name].shape[-1] for name in pair)
    if widths[0] != widths[1]:
        checks.fail(
            "`interactions` must be pairs of vectors of equal width.",
            interaction=tuple(pair),
            widths=widths,
        )
    return layers.Multiply(name="_times_".join(pair))([vectors[name] for name in pair])


def _concatenate(vectors: list[Tensor]) -> Tensor:
    return layers.Concatenate(name="features")(vectors) if len(vectors) > 1 else vectors[0]


def _check_layer_names(outputs: Mapping[str, Tensor]) -> None:
    """Fails where two layers of the model have one name, by which Keras saves them."""
    operations: dict[int, keras.Operation] = {}
    seen: set[tuple[int, int]] = set()
    tensors = list(outputs.values())
    while tensors:
        operation, call, _ = tensors.pop()._keras_history
        operations[id(operation)] = operation
        if (id(operation), call) not in seen:
            seen.add((id(operation), call))
            tensors += operation._inbound_nodes[call].input_tensors
    names = Counter(operation.name for operation in operations.values())
    repeated = sorted(name for name, count in names.items() if count > 1)
    if repeated:
        checks.fail(
            "`features`, `interactions` and `tasks` must give each layer a name of its own. A task "
            "'a' names the layers 'a' and 'a_tower', a feature 'b' its input and what encodes it, "
            "such as 'b_embedding'; 'mmoe', 'features', 'shared_hidden' and the like are taken.",
            repeated=repeated,
        )


def _bottom_widths(
    width: int, num_tasks: int, num_experts: int, expert_widths: tuple[int, ...], read_by: int
) -> tuple[int, ...]:
    """Widths of a shared bottom with as many parameters as the MMoE.

    `read_by` are the units that read its output: the first layers of all towers. The layers keep
    the proportions of an expert's; the last one fills up what is missing.
    """
    target = (
        num_experts * _mlp_parameters(width, expert_widths)
        + num_tasks * width * num_experts
        + read_by * expert_widths[-1]
    )

    def hidden(last: int) -> tuple[int, ...]:
        return tuple(
            max(1, round(last / expert_widths[-1] * units)) for units in expert_widths[:-1]
        )

    def parameters(last: int) -> int:
        return _mlp_parameters(width, (*hidden(last), last)) + read_by * last

    inner = hidden(bisect.bisect_left(range(target), target, lo=1, key=parameters))
    left = target - _mlp_parameters(width, inner)
    return (*inner, max(1, round(left / ((width, *inner)[-1] + 1 + read_by))))


def _mlp_parameters(width: int, widths: Sequence[int]) -> int:
    return sum((a + 1) * b for a, b in zip((width, *widths), widths, strict=False))


def _optional_units(name: str, units: int | Sequence[int]) -> tuple[int, ...]:
    is_empty = isinstance(units, Sequence) and not units
    return () if is_empty else checked_units(name, units)


def _checked_features(features: Any) -> tuple[Feature, ...]:
    is_sequence = isinstance(features, Sequence) and len(features) > 0
    if not is_sequence or not all(isinstance(feature, Feature) for feature in features):
        checks.fail(
            "`features` must be a sequence of `keras_moe.models.features` records.",
            features=features,
        )
    names = [feature.name for feature in features]
    if len(set(names)) != len(names):
        checks.fail("`features` must have distinct names.", names=names)
    tables = [feature.name for feature in features if isinstance(feature, Categorical)]
    for feature in features:
        if isinstance(feature, History) and feature.of not in tables:
            checks.fail(
                f"`of` must name a `Categorical` feature, of {sorted(tables)}.",
                name=feature.name,
                of=feature.of,
            )
    return tuple(features)


def _checked_tasks(tasks: Any, features: Sequence[Feature]) -> dict[str, str]:
    kinds = sorted(_TASK_ACTIVATIONS)
    if not isinstance(tasks, Mapping) or not tasks:
        checks.fail(f"`tasks` must be a dict of names to kinds, of {kinds}.", tasks=tasks)
    for task, kind in tasks.items():
        checks.layer_name("task", task)
        if kind not in kinds:
            checks.fail(f"`tasks` must be of one of the kinds {kinds}.", **{task: kind})
    shared = sorted(set(tasks) & {feature.name for feature in features})
    if shared:
        checks.fail("`tasks` and `features` must have different names.", in_both=shared)
    return dict(tasks)


def _checked_starts(starts: Any, tasks: Mapping[str, str]) -> dict[str, float]:
    """The biases that make the initial predictions."""
    starts = {} if starts is None else starts
    if not isinstance(starts, Mapping) or not set(starts) <= set(tasks):
        checks.fail(
            f"`initial_predictions` must be a dict of tasks, of {sorted(tasks)}, to numbers.",
            initial_predictions=starts,
        )
    biases = dict.fromkeys(tasks, 0.0)
    for task, start in starts.items():
        is_number = isinstance(start, int | float | np.number) and math.isfinite(start)
        is_binary = tasks[task] == "binary"
        if not is_number or (is_binary and not 0 < start < 1):
            expected = "probabilities between 0 and 1" if is_binary else "finite numbers"
            checks.fail(
                f"`initial_predictions` of {tasks[task]} tasks must be {expected}.",
                **{task: start},
            )
        biases[task] = math.log(start / (1 - start)) if is_binary else float(start)
    return biases
