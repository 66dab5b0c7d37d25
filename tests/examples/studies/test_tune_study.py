"""The tuning study: whole runs, kills, failures, other searches' folders, the Pareto front."""

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of keras-tuner's import
    import keras_tuner

import tune
from tuning import search as search_module
from tuning import show
from tuning.compare import default_values, train
from tuning.pareto import pareto_front
from tuning.search import SAVED, Figure, Search, claim, run_trials

import keras_moe
from keras_moe.tuning import ActiveCost

STUDIES = Path(__file__).parents[3] / "examples" / "studies"
TRIALS = 4


class Toy(keras_tuner.HyperModel):
    """Its trials train nothing; some of them fail, one can wait to be killed."""

    def __init__(self, failing=(), waiting=None):
        super().__init__()
        self.failing, self.waiting, self.fitted = failing, waiting, 0

    def build(self, hp):
        inputs = keras.Input((3,))
        units = hp.Choice("units", [4, 8, 16, 32, 64, 128])
        outputs = keras.layers.Dense(units, kernel_initializer="zeros")(inputs)
        return keras.Model(inputs, outputs)

    def fit(self, hp, model, callbacks, **arguments):
        trial, self.fitted = self.fitted, self.fitted + 1
        if trial == self.waiting:
            time.sleep(600)
        if trial in self.failing:
            raise ArithmeticError(f"trial {trial} diverged")
        (cost,) = (callback for callback in callbacks if isinstance(callback, ActiveCost))
        cost.set_model(model)
        cost.on_train_begin()
        logs = {"val_loss": 1 / hp.get("units")}
        cost.on_epoch_end(0, logs)
        return logs

    def get_config(self):
        return {}


def toy_search(hypermodel, max_flops=None) -> Search:
    x = np.zeros((8, 3), "float32")
    return Search(
        name="toy",
        title="Toy",
        hypermodel=lambda seed: hypermodel,
        objective=ActiveCost("val_loss", "min", max_flops=max_flops),
        metric=Figure("val_loss", "loss", higher_is_better=False),
        fit={"x": x, "epochs": 3, "batch_size": 8},
        test={},
        figures=(Figure("loss", "Loss", higher_is_better=False),),
    )


def search_toy(out, hypermodel, trials=TRIALS, tuner="random", max_flops=None):
    search = toy_search(hypermodel, max_flops)
    claim(search, out, tuner, overwrite=False)
    return run_trials(search, out, tuner, trials, lambda **_: None)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {
        str(path): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in folder.rglob("*")
        if path.is_file()
    }


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return search_toy(tmp_path_factory.mktemp("whole"), Toy())


class TestParetoFront:
    @pytest.mark.parametrize(
        ("costs", "scores", "expected"),
        [
            ([1, 2, 3], [0.1, 0.2, 0.3], [0, 1, 2]),
            ([3, 2, 1], [0.1, 0.2, 0.3], [2]),
            ([1, 1, 2], [0.1, 0.2, 0.2], [1]),  # dearer and equal is dominated
            ([1, 1], [0.5, 0.5], [0, 1]),  # equal points stay together
            ([1, 2], [float("nan"), 0.2], [1]),
            ([float("nan"), 2], [0.9, 0.2], [1]),
            ([], [], []),
        ],
    )
    def test_by_hand(self, costs, scores, expected):
        assert sorted(pareto_front(costs, scores)) == expected
        negated = [-score for score in scores]
        assert sorted(pareto_front(costs, negated, higher_is_better=False)) == expected

    @given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1), st.booleans())
    def test_holds_exactly_the_points_that_nothing_dominates(self, points, higher_is_better):
        sign = 1 if higher_is_better else -1

        def dominates(first, second):
            is_no_worse = first[0] <= second[0] and sign * first[1] >= sign * second[1]
            return is_no_worse and first != second

        expected = {
            index
            for index, point in enumerate(points)
            if not any(dominates(other, point) for other in points)
        }
        assert set(pareto_front(*zip(*points, strict=True), higher_is_better)) == expected


class TestKilled:
    def test_goes_on_as_if_nothing_had_happened(self, tmp_path, uninterrupted):
        paths = [Path(keras_moe.__file__).parents[1], STUDIES]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
        child = subprocess.Popen([sys.executable, __file__, str(tmp_path)], env=environment)
        begun, deadline = tmp_path / "toy" / "trial_2" / "trial.json", time.monotonic() + 500
        while not begun.exists() and child.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        child.send_signal(signal.SIGKILL)  # in the third trial
        assert child.wait() == -signal.SIGKILL
        before = json.loads((tmp_path / "toy" / SAVED).read_text())
        assert [name for name in before if "trial.json" in name] != []

        hypermodel = Toy()
        rows = search_toy(tmp_path, hypermodel)
        assert hypermodel.fitted == TRIALS - 2
        assert [row.values for row in rows] == [row.values for row in uninterrupted]
        np.testing.assert_allclose(
            [row.metric for row in rows], [row.metric for row in uninterrupted], rtol=1e-5
        )
        after = json.loads((tmp_path / "toy" / SAVED).read_text())
        for trial in ("trial_0", "trial_1"):
            assert after[f"{trial}/trial.json"] == before[f"{trial}/trial.json"]
        assert search_toy(tmp_path, Toy(failing=range(TRIALS))) == rows  # nothing is left to do

    @pytest.mark.parametrize("name", ["oracle.json", "tuner0.json", "trial_0/trial.json"])
    def test_files_half_written_are_put_back(self, tmp_path, uninterrupted, name):
        search_toy(tmp_path, Toy(), trials=2)
        file = tmp_path / "toy" / name
        file.write_text(file.read_text()[:20])
        hypermodel = Toy()
        rows = search_toy(tmp_path, hypermodel)
        assert hypermodel.fitted == TRIALS - 2
        assert [row.values for row in rows] == [row.values for row in uninterrupted]

    def test_an_ended_trial_that_the_tuner_thinks_is_running(self, tmp_path, uninterrupted):
        """KerasTuner writes the trial's end before it takes it off the list of those running."""
        search_toy(tmp_path, Toy(), trials=2)
        oracle = tmp_path / "toy" / "oracle.json"
        state = json.loads(oracle.read_text())
        state["ongoing_trials"] = {"tuner0": "1"}
        oracle.write_text(json.dumps(state))
        hypermodel = Toy()
        search_toy(tmp_path, hypermodel)
        assert hypermodel.fitted == TRIALS - 2

    @pytest.mark.parametrize(("tuner", "trials"), [("hyperband", 3), ("bayesian", 4)])
    def test_the_other_tuners_stop_and_go_on(self, tmp_path, tuner, trials):
        first = search_toy(tmp_path, Toy(), trials=2, tuner=tuner)
        hypermodel = Toy()
        rows = search_toy(tmp_path, hypermodel, trials=trials, tuner=tuner)
        assert rows[:2] == first
        assert len(rows) == trials and hypermodel.fitted == trials - 2


class TestFailures:
    def test_many_in_a_row_are_recorded_and_the_search_goes_on(self, tmp_path, capsys):
        rows = search_toy(tmp_path, Toy(failing=(0, 1, 2)), trials=4)
        assert [row.status for row in rows] == ["failed"] * 3 + ["complete"]
        assert rows[2].message == "ArithmeticError: trial 2 diverged"
        assert rows[3].message == "" and np.isfinite(rows[3].metric)
        search = toy_search(Toy())
        assert show.best_of(search, rows) is rows[3]
        show.trials(search, rows)
        assert "trial 3, failed: ArithmeticError: trial 2 diverged" in capsys.readouterr().out

    def test_all(self, tmp_path):
        rows = search_toy(tmp_path, Toy(failing=range(TRIALS)))
        assert [row.status for row in rows] == ["failed"] * TRIALS
        assert show.best_of(toy_search(Toy()), rows) is None

    def test_a_model_above_the_cap_is_not_trained(self, tmp_path):
        rows = search_toy(tmp_path, Toy(), max_flops=2 * 3 * 16)
        assert {row.status for row in rows} == {"complete", "above the cap"}
        for row in rows:
            assert row.is_complete == (row.values["units"] <= 16)
            assert row.is_complete or "above max_flops=96. It is not trained." in row.message


class TestOtherSearch:
    def test_is_left_alone(self, tmp_path, capsys):
        arguments = ["--search", "vit", "--quick", "--out", str(tmp_path)]
        options = tune.parse_arguments(arguments)
        claim(tune.digits_search(options), tmp_path, "random", overwrite=False)
        (tmp_path / "vit" / "trial_0").mkdir()
        (tmp_path / "vit" / "trial_0" / "trial.json").write_text("precious")
        before = contents(tmp_path)
        assert tune.main([*arguments, "--tuner", "bayesian"]) == 2
        error = capsys.readouterr().err
        assert "another search, which differs in tuner. Nothing was changed" in error
        assert "--overwrite" in error
        assert contents(tmp_path) == before

    def test_overwrite_deletes_only_what_is_a_search(self, tmp_path, monkeypatch):
        foreign = tmp_path / "toy" / "trial_0"
        foreign.mkdir(parents=True)
        with pytest.raises(ValueError, match="trials of an unknown search"):
            claim(toy_search(Toy()), tmp_path, "random", overwrite=True)
        assert foreign.exists()
        foreign.rmdir()
        search_toy(tmp_path, Toy(), trials=1)
        claim(toy_search(Toy()), tmp_path, "bayesian", overwrite=True)
        assert [path.name for path in (tmp_path / "toy").iterdir()] == ["search.json"]


class TestWholeRun:
    def test_both_searches_then_again_without_training(self, tmp_path, capsys, monkeypatch):
        arguments = ["--quick", "--trials", "1", "--seeds", "1", "--out", str(tmp_path)]
        assert tune.main(arguments) == 0
        printed = capsys.readouterr().out
        record = json.loads((tmp_path / "figures.json").read_text())
        assert (tmp_path / "pareto.png").read_bytes().startswith(b"\x89PNG")
        assert list(record) == ["vit", "recommender"]
        for name, found in record.items():
            default, *trials = found["trials"]
            assert default["number"] == "default" and len(trials) == 1
            for trial in trials:
                (file,) = (tmp_path / name).glob(f"trial_{int(trial['number']) - 1}/trial.json")
                stored = json.loads(file.read_text())
                assert trial["metric"] == stored["score"]
                assert trial["values"] == stored["hyperparameters"]["values"]
                (flops,) = stored["metrics"]["metrics"]["active_flops"]["observations"]
                assert [trial["flops"]] == flops["value"]
                assert f"{stored['score']:.4f}" in printed
                assert show.cost(trial["flops"]).strip() in printed
            assert [run["seed"] for run in found["test"]["best"]] == [1]
            for verdict in found["verdicts"]:
                assert verdict.partition(" (")[0][:60] in " ".join(printed.split())

        monkeypatch.setattr(keras.Model, "fit", None)
        assert tune.main(arguments) == 0
        assert json.loads((tmp_path / "figures.json").read_text()) == record

    @pytest.mark.parametrize("wrong", [["--trials", "0"], ["--tuner", "grid"], ["--search", "x"]])
    def test_wrong_options(self, wrong, capsys):
        with pytest.raises(SystemExit):
            tune.parse_arguments(wrong)
        assert wrong[0] in capsys.readouterr().err

    def test_splits_share_no_digit(self):
        search = tune.digits_search(tune.parse_arguments([]))
        splits = (search.fit["x"], search.fit["validation_data"][0], search.test["x"])
        rows = [{image.tobytes() for image in split} for split in splits]
        assert not rows[0] & rows[1] and not rows[0] & rows[2] and not rows[1] & rows[2]


def test_the_seed_is_one_that_keras_tuner_takes():
    assert search_module.SEED  # it draws one of its own in place of 0


if __name__ == "__main__":
    search_toy(Path(sys.argv[1]), Toy(waiting=2))


class TestRetraining:
    def test_a_compiled_model_started_anew_equals_a_new_one(self, tmp_path):
        options = tune.parse_arguments(["--quick"])
        search = tune.digits_search(options)
        values = default_values(search)

        def run(folder, seed, compiled):
            (tmp_path / folder).mkdir(exist_ok=True)
            return train(search, tmp_path / folder, values, seed, lambda **_: None, compiled)

        compiled = {}
        first = run("one", 0, compiled)
        reused, new = run("one", 1, compiled), run("other", 1, {})
        assert len(compiled) == 1
        assert (reused.metric, reused.test) == (new.metric, new.test)
        assert reused.metric != first.metric
