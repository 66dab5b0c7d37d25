"""A results folder of another search is refused, and nothing in it changes."""

import json

import keras
import numpy as np
import pytest

from keras_moe import tuning
from keras_moe.models import features

pytestmark = pytest.mark.one_backend("arithmetic on configurations")


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_the_same_search_may_resume_and_another_may_not(tmp_path):
    search = {"objective": "val_loss", "data": {"name": "digits", "side": 8}, "seed": 0}
    tuning.check_project(tmp_path, "a", **search)
    tuning.check_project(tmp_path, "a", **search)
    tuning.check_project(str(tmp_path), "b", **{**search, "seed": 1})  # another folder
    before = contents(tmp_path)
    for name, value, path in [
        ("objective", "val_accuracy", "objective"),
        ("data", {"name": "digits", "side": 16}, "data.side"),
        ("seed", None, "seed"),
        ("tuner", "Hyperband", "tuner"),
    ]:
        with pytest.raises(ValueError, match=rf"another search, which differs in {path}\. Noth"):
            tuning.check_project(tmp_path, "a", **{**search, name: value})
    assert contents(tmp_path) == before


@pytest.mark.parametrize("there", ["oracle.json", "trial_0/trial.json"])
def test_trials_of_an_unknown_search_are_refused(tmp_path, there):
    path = tmp_path / "a" / there
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    with pytest.raises(ValueError, match=r"trials of an unknown search .* project_name='a'"):
        tuning.check_project(tmp_path, "a", seed=0)
    assert contents(tmp_path) == {f"a/{there}": b"{}"}


def test_a_damaged_record_is_another_search(tmp_path):
    tuning.check_project(tmp_path, "a", seed=0)
    (tmp_path / "a" / "search.json").write_text('{"seed"')
    with pytest.raises(ValueError, match=r"differs in search.json"):
        tuning.check_project(tmp_path, "a", seed=0)


def test_what_may_define_a_search(tmp_path):
    hypermodel = tuning.HyperMMoERecommender(
        [features.Categorical("user", 10), features.Numeric("age", mean=[30.0], variance=[9.0])],
        {"click": "binary"},
        learning_rate=(1e-3, np.float32(0.5)),
    )
    vit = tuning.HyperViTMoE((8, 8, 1), 10, feed_forward=("dense", keras.layers.Dense))
    search = {
        "hypermodel": hypermodel,
        "vit": vit,
        "cost": tuning.ActiveCost("val_loss", "min", max_flops=1e6),
        "tuner": keras.Model,
        "loader": contents,
        "folder": tmp_path,
        "sizes": range(3),
        "mean": np.arange(3.0),
    }
    tuning.check_project(tmp_path, "a", **search)
    tuning.check_project(tmp_path, "a", **search)
    record = json.loads((tmp_path / "a" / "search.json").read_text())
    assert record["hypermodel"]["config"]["features"][1]["config"]["mean"] == [30.0]
    assert record["vit"]["config"]["feed_forward"][1].endswith("Dense")
    changed = tuning.HyperMMoERecommender([features.Categorical("user", 11)], {"click": "binary"})
    with pytest.raises(ValueError, match=r"hypermodel.config.features, hypermodel.config.learning"):
        tuning.check_project(tmp_path, "a", **{**search, "hypermodel": changed})


def test_what_cannot_be_written_down_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`data.images` must be a JSON-like value"):
        tuning.check_project(tmp_path, "a", data={"images": object()})
    assert not list(tmp_path.iterdir())
