"""The best of a search against the default hyperparameters, on the test split, over seeds."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import keras_tuner
from common import seeds
from common.resume import set_state, state_of

from keras_moe.tuning import ActiveCost
from tuning.search import RETRAINED, Figure, Row, Search, of_the_model, write_whole

SEARCH_SEED = 0  # of the weights in every trial; the comparison takes 1, 2, 3, ...


@dataclass(frozen=True)
class Run:
    """One training outside of the search."""

    values: dict[str, Any]
    seed: int
    metric: float  # the best epoch's, on validation
    test: dict[str, float]
    flops: float
    parameters: float
    seconds: float

    def as_row(self, number: str) -> Row:
        return Row(
            number, self.values, self.metric, self.flops, self.parameters, self.seconds, "complete"
        )


def default_values(search: Search) -> dict[str, Any]:
    """Return the hyperparameters that the hypermodel has where nothing is searched."""
    hp = keras_tuner.HyperParameters()
    search.hypermodel(SEARCH_SEED).build(hp)
    return {each.name: hp.values[each.name] for each in hp.space if hp.is_active(each)}


def train(
    search: Search,
    folder: Path,
    values: dict[str, Any],
    seed: int,
    progress: Callable[..., None],
    compiled: dict[str, keras.Model],
) -> Run:
    """Train with these hyperparameters as in a trial, or return the run of an earlier process.

    Args:
        search: What is searched.
        folder: Where the runs are kept.
        values: The hyperparameters.
        seed: Seed of the weights and of the training.
        progress: Called with `epoch`, how many are done.
        compiled: Models of this search by hyperparameters; one that is there is started anew from
            the seed, since compiling takes longer than training. One that is not is added.
    """
    file = folder / RETRAINED
    runs = [Run(**run) for run in json.loads(file.read_text())] if file.exists() else []
    values = of_the_model(values)
    for run in runs:
        if (run.values, run.seed) == (values, seed):
            return run

    began = time.perf_counter()
    keras.utils.clear_session()
    hypermodel = search.hypermodel(seed)
    hp = keras_tuner.HyperParameters()
    hp.values = dict(values)
    drawn = hypermodel.build(hp)
    model = compiled.setdefault(json.dumps(values, sort_keys=True), drawn)
    set_state(model, state_of(drawn))
    epochs = search.fit["epochs"]
    # Without the cap, which the default may be above.
    objective = ActiveCost(search.objective.metrics, search.objective.direction)
    callbacks = [
        objective,  # first: it writes the metric that the next one reads
        keras.callbacks.EarlyStopping(
            objective.name, mode=objective.direction, patience=epochs, restore_best_weights=True
        ),
        keras.callbacks.LambdaCallback(
            # Of the shuffling: a model's first fit draws once more than its later ones.
            on_train_begin=lambda logs: keras.utils.set_random_seed(seed),
            on_epoch_end=lambda epoch, logs: progress(epoch=epoch + 1),
        ),
    ]
    history = hypermodel.fit(hp, model, **search.fit, callbacks=callbacks, verbose=0).history
    best = max if objective.direction == "max" else min
    tested = model.evaluate(**search.test, verbose=0, return_dict=True)
    run = Run(
        values=values,
        seed=seed,
        metric=float(best(history[objective.name])),
        test={figure.name: float(tested[figure.name]) for figure in search.figures},
        flops=history["active_flops"][-1],
        parameters=history["active_parameters"][-1],
        seconds=time.perf_counter() - began,
    )
    write_whole(file, [asdict(each) for each in [*runs, run]])
    return run


def verdict(figure: Figure, best: list[Run], default: list[Run]) -> str:
    """Return a sentence on who wins one figure, as far as the paired seeds can tell."""
    mean, half_width = difference(figure, best, default)
    count = len(best)
    if count < 2:
        return f"{figure.title}: {mean:+.4f}; one seed cannot tell whether that is chance."
    numbers = f"({mean:+.4f} ± {half_width:.4f}, 95 % interval over {count} paired seeds)"
    if abs(mean) <= half_width:
        outcome = f"does not beat the default as far as {count} seeds can show"
    else:
        is_better = (mean > 0) == figure.higher_is_better
        outcome = f"is {'better' if is_better else 'worse'} than the default"
    return f"{figure.title}: the best of the search {outcome} {numbers}."


def difference(figure: Figure, best: list[Run], default: list[Run]) -> tuple[float, float]:
    """Return the mean of best - default over seeds and the half width of its 95 % interval."""
    return seeds.paired_interval(
        *([run.test[figure.name] for run in runs] for runs in (best, default))
    )


def mean_and_spread(runs: list[Run], figure: Figure) -> str:
    return seeds.mean_and_spread([run.test[figure.name] for run in runs])
