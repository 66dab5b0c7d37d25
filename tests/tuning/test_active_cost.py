"""The objective that knows the cost: its arithmetic, its caps, and what KerasTuner makes of it."""

import copy

import keras
import keras_tuner
import numpy as np
import pytest

from keras_moe import tuning

pytestmark = [
    pytest.mark.one_backend("arithmetic on configurations"),
    pytest.mark.usefixtures("quick_search"),
]

X = np.random.default_rng(0).normal(size=(16, 4)).astype("float32")
Y = X.sum(axis=1, keepdims=True)
UNITS = (2, 64, 4, 8)


def build(hp):
    """A user's own hypermodel; 5 units + (units + 1) parameters."""
    units = hp.Choice("units", UNITS)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(units), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    return model


def parameters(units):
    return 6 * units + 1


def flops(units):
    return 2 * (4 * units + units)


def search(folder, cost, max_trials=4, build=build, **arguments):
    tuner = keras_tuner.GridSearch(
        build,
        objective=cost.objective,
        max_trials=max_trials,
        directory=folder,
        project_name="search",
        **arguments,
    )
    tuner.search(X, Y, validation_data=(X, Y), epochs=1, verbose=0, callbacks=[cost])
    return tuner


def by_units(tuner):
    return {t.hyperparameters.values["units"]: t for t in tuner.oracle.trials.values()}


@pytest.mark.parametrize(
    ("direction", "exponent", "flops", "parameters", "expected"),
    [
        ("max", 0.07, 100, 10, 0.8),  # at both targets
        ("max", 0.07, 200, 10, 0.8 * 2**-0.07),  # MnasNet, equation 2
        ("max", 0.07, 50, 10, 0.8 * 2**0.07),
        ("min", 0.07, 200, 10, 0.8 * 2**0.07),
        ("min", 0.07, 200, 40, 0.8 * 2**0.07 * 4**0.07),
        ("max", (0.0, 1.0), 50, 10, 0.8),  # MnasNet's hard constraint
        ("max", (0.0, 1.0), 300, 10, 0.8 / 3),
        ("min", (0.0, 1.0), 300, 5, 0.8 * 3),
        ("max", 0, 1000, 1, 0.8),
    ],
)
def test_score_by_hand(direction, exponent, flops, parameters, expected):
    cost = tuning.ActiveCost(
        "m", direction, target_flops=100, target_parameters=10, exponent=exponent
    )
    assert cost.score(0.8, flops, parameters) == pytest.approx(expected, rel=1e-12)


def test_a_metric_below_zero_is_refused():
    cost = tuning.ActiveCost("val_r2", "max", target_flops=100)
    with pytest.raises(ValueError, match=r"`metric` must be at least 0 .* val_r2=-0.5"):
        cost.score(-0.5, 100, 1)
    assert np.isnan(cost.score(float("nan"), 100, 1))  # KerasTuner marks such a trial as invalid


def test_names_and_objective():
    plain = tuning.ActiveCost("val_loss", "min", max_flops=10)
    assert plain.objective == keras_tuner.Objective("val_loss", "min")
    penalised = tuning.ActiveCost(["a", "b"], "max", target_parameters=10)
    assert penalised.objective == keras_tuner.Objective("mean(a, b)_at_cost", "max")
    again = tuning.ActiveCost(**copy.deepcopy(penalised).get_config())
    assert again.get_config() == penalised.get_config()


@pytest.mark.parametrize("direction", ["max", "min"])
def test_search_records_cost_and_follows_the_score(tmp_path, direction):
    cost = tuning.ActiveCost(["val_loss", "loss"], direction, target_flops=flops(4), exponent=3.0)
    tuner = search(tmp_path, cost)
    scores = {}
    for units, trial in by_units(tuner).items():
        values = {name: trial.metrics.get_best_value(name) for name in trial.metrics.metrics}
        assert values["active_flops"] == flops(units)
        assert values["active_parameters"] == parameters(units)
        mean = (values["loss"] + values["val_loss"]) / 2
        sign = -3 if direction == "max" else 3
        expected = mean * (flops(units) / flops(4)) ** sign
        assert trial.score == pytest.approx(expected, rel=1e-6)
        scores[units] = trial.score
    assert sorted(scores) == sorted(UNITS)
    best = max(scores, key=scores.get) if direction == "max" else min(scores, key=scores.get)
    assert tuner.get_best_hyperparameters()[0].get("units") == best == 2


@pytest.mark.parametrize(
    ("cap", "message"),
    [
        ({"max_flops": flops(8)}, "The model has 640 active FLOPs per example, above max_flops=80"),
        ({"max_parameters": parameters(8)}, "385 active parameters, above max_parameters=49"),
    ],
)
def test_a_cap_fails_the_trial_before_training_and_the_search_goes_on(tmp_path, cap, message):
    tuner = search(tmp_path, tuning.ActiveCost("val_loss", "min", **cap))
    trials = by_units(tuner)
    assert {units: t.status for units, t in trials.items()} == {
        2: "COMPLETED",
        64: "FAILED",
        4: "COMPLETED",
        8: "COMPLETED",
    }
    assert message in trials[64].message
    assert not trials[64].metrics.metrics
    saved = keras_tuner.engine.trial.Trial.load(
        tmp_path / "search" / f"trial_{trials[64].trial_id}" / "trial.json"
    )
    assert message in saved.message


class Own(keras_tuner.HyperModel):
    """A hypermodel that trains its models itself."""

    def build(self, hp):
        return build(hp)

    def fit(self, hp, model, *args, **kwargs):
        return model.fit(*args, **{**kwargs, "epochs": 2})


BOTH = {"max_flops": flops(8), "max_parameters": parameters(8)}
CAPPED = "385 active parameters, above max_parameters=49. It is not trained."


@pytest.mark.parametrize("hypermodel", [build, Own()], ids=["function", "object"])
@pytest.mark.parametrize("target", [None, 100])
def test_a_capped_trial_has_its_cost_and_one_line(tmp_path, capfd, hypermodel, target):
    cost = tuning.ActiveCost("val_loss", "min", **BOTH, target_flops=target)
    tuner = search(tmp_path, cost, build=cost.capped(hypermodel))
    trials = by_units(tuner)
    statuses = {units: trial.status for units, trial in trials.items()}
    assert statuses == {**dict.fromkeys(UNITS, "COMPLETED"), 64: "FAILED"}
    printed = "".join(capfd.readouterr())
    assert "Traceback" not in printed and "Error" not in printed
    saved = keras_tuner.engine.trial.Trial.load(
        tmp_path / "search" / f"trial_{trials[64].trial_id}" / "trial.json"
    )
    for trial in (trials[64], saved):
        assert trial.metrics.get_best_value("active_flops") == flops(64)
        assert trial.metrics.get_best_value("active_parameters") == parameters(64)
        assert trial.message.endswith(CAPPED) and "\n" not in trial.message
    assert tuner.get_best_hyperparameters()[0].get("units") != 64
    fit = {"epochs": 1, "verbose": 0, "callbacks": []}
    history = tuner.hypermodel.fit(None, built_model(), X, Y, **fit)
    assert len(history.epoch) == (2 if isinstance(hypermodel, Own) else 1)


def built_model():
    return build(keras_tuner.HyperParameters())


@pytest.mark.filterwarnings("ignore:.*length_scale.*")
@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
@pytest.mark.parametrize("kind", ["RandomSearch", "Hyperband", "BayesianOptimization"])
def test_every_tuner_goes_on_after_capped_trials(tmp_path, kind):
    cost = tuning.ActiveCost("val_loss", "min", **BOTH)
    limit = {"max_epochs": 2, "factor": 2} if kind == "Hyperband" else {"max_trials": 4}
    tuner = getattr(keras_tuner, kind)(
        cost.capped(build),
        objective=cost.objective,
        max_consecutive_failed_trials=9,
        seed=0,
        directory=tmp_path,
        **limit,
    )
    tuner.search(X, Y, validation_data=(X, Y), verbose=0, callbacks=[cost])
    trials = tuner.oracle.trials.values()
    assert {t.status for t in trials if t.hyperparameters.get("units") == 64} <= {"FAILED"}
    assert {t.status for t in trials if t.hyperparameters.get("units") < 9} == {"COMPLETED"}
    assert all(trial.metrics.exists("active_flops") for trial in trials)


def test_a_capped_hypermodel_passes_on_what_it_does_not_know(tmp_path):
    def fragile(hp):
        raise ValueError("No model works here.")

    class Declared(Own):
        def declare_hyperparameters(self, hp):
            hp.Choice("declared", [1, 2])

    cost = tuning.ActiveCost("val_loss", "min", max_flops=1)
    with pytest.raises(ValueError, match="No model works here"):
        cost.capped(fragile).build(keras_tuner.HyperParameters())
    hypermodel = Declared(name="mine", tunable=False)
    capped = cost.capped(hypermodel)
    hp = keras_tuner.HyperParameters()
    capped.declare_hyperparameters(hp)
    assert (capped.name, capped.tunable, list(hp.values)) == ("mine", False, ["declared"])
    assert capped.get_config() == {"hypermodel": hypermodel}
    with pytest.raises(keras_tuner.errors.FailedTrialError, match="above max_flops=1"):
        built_model().fit(X, Y, verbose=0, callbacks=[cost])  # outside of a search


def test_kerastuner_ends_a_search_after_failures_in_a_row(tmp_path):
    cost = tuning.ActiveCost("val_loss", "min", max_flops=1)
    with pytest.raises(RuntimeError, match="consecutive failures exceeded the limit of 2"):
        search(tmp_path / "few", cost, max_consecutive_failed_trials=2)
    tuner = search(tmp_path / "all", cost, max_consecutive_failed_trials=100)
    assert [t.status for t in tuner.oracle.trials.values()] == ["FAILED"] * 4


def test_a_failing_trial_is_recorded_and_the_search_goes_on(tmp_path):
    def fragile(hp):
        if hp.Choice("units", UNITS) == 64:
            raise ValueError("64 units do not work here.")
        return build(hp)

    trials = by_units(search(tmp_path, tuning.ActiveCost("val_loss", "min"), build=fragile))
    assert [trials[units].status for units in UNITS] == ["COMPLETED", "FAILED"] + ["COMPLETED"] * 2
    assert "64 units do not work here." in trials[64].message


def test_a_metric_that_is_not_logged_ends_the_search(tmp_path):
    cost = tuning.ActiveCost("val_accuracy", "max")
    with pytest.raises(ValueError, match=r"`metric` must be among \['loss', 'val_loss'\]"):
        search(tmp_path, cost)


def test_resuming_does_not_repeat_trials(tmp_path):
    built = []

    def counted(hp):
        built.append(hp.Choice("units", UNITS))
        return build(hp)

    def random_search(max_trials):
        cost = tuning.ActiveCost("val_loss", "min", target_flops=100)
        tuner = keras_tuner.RandomSearch(
            counted,
            objective=cost.objective,
            max_trials=max_trials,
            seed=3,
            directory=tmp_path,
            project_name="search",
        )
        built.clear()
        tuner.search(X, Y, validation_data=(X, Y), epochs=1, verbose=0, callbacks=[cost])
        return tuner

    first = by_units(random_search(2))
    tuner = random_search(4)
    assert len(built) == 2 and not set(built) & set(first)
    assert sorted(by_units(tuner)) == sorted(UNITS)
    for units, trial in first.items():
        assert by_units(tuner)[units].score == trial.score
    random_search(4)
    assert built == []


BAD = [
    ({"metric": []}, r"`metric` must be a name .* Received: metric=\[\]"),
    ({"metric": [3]}, "`metric` must be a name"),
    ({"direction": "up"}, r"`direction` must be one of \['max', 'min'\]. Received: direction='up'"),
    ({"max_flops": 0}, "`max_flops` must be a number above 0. Received: max_flops=0"),
    ({"max_parameters": -1}, "`max_parameters` must be a number above 0"),
    ({"target_flops": "1e6"}, "`target_flops` must be a number above 0"),
    ({"exponent": -0.07}, "`exponent` must be a number of at least 0. Received: exponent=-0.07"),
    ({"exponent": (0, 1, 2)}, "`exponent` must be a number or a pair of numbers"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        tuning.ActiveCost(**{"metric": "val_loss", "direction": "min", **arguments})
