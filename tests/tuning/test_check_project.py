"""A results folder of another search is refused, and nothing in it changes."""

import functools
import json

import keras
import keras_tuner
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
    vit = tuning.HyperViTMoE(
        (8, 8, 1), 10, patch_size=4, depth=1, feed_forward=("dense", keras.layers.Dense)
    )
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


# === Search spaces ===


def build(hp, choices=(2, 4), conditional=(8,)):
    """A user's own hypermodel, which declares a hyperparameter where another one has a value."""
    units = hp.Choice("units", list(choices))
    hp.Choice("kind", ["one", "two"])
    with hp.conditional_scope("kind", ["two"]):
        more = hp.Choice("more", list(conditional), default=conditional[0])
    layers = [keras.layers.Dense(width) for width in (units, more) if width is not None]
    model = keras.Sequential([keras.Input((4,)), *layers])
    model.compile("sgd", "mse")
    return model


class Own(keras_tuner.HyperModel):
    """A hypermodel without a configuration."""

    def __init__(self, **arguments):
        super().__init__()
        self._arguments = arguments

    def build(self, hp):
        return build(hp, **self._arguments)


def function_of(**arguments):
    def own_build(hp):
        return build(hp, **arguments)

    return own_build


@pytest.mark.parametrize("key", ["hypermodel", "what"])
@pytest.mark.parametrize(
    "make",
    [function_of, Own, functools.partial(functools.partial, build)],
    ids=["function", "hypermodel", "partial"],
)
@pytest.mark.parametrize(
    ("changed", "path"), [({"choices": (2, 8)}, "units"), ({"conditional": (8, 16)}, "more")]
)
def test_a_hypermodel_with_another_space_is_another_search(tmp_path, key, make, changed, path):
    tuning.check_project(tmp_path, "a", **{key: make()})
    tuning.check_project(tmp_path, "a", **{key: make()})
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=rf"which differs in {key}\.space\.{path}\. Noth"):
        tuning.check_project(tmp_path, "a", **{key: make(**changed)})
    assert contents(tmp_path) == before


def test_a_hypermodel_of_this_package_is_compared_by_its_space_too(tmp_path):
    class Deeper(tuning.HyperViTMoE):
        def build(self, hp):
            hp.Choice("another", [1, 2])
            return super().build(hp)

    arguments = {"patch_size": 4, "width": 8, "depth": 1, "num_heads": 2, "moe_layers": 1}
    vits = [kind((8, 8, 1), 3, **arguments) for kind in (tuning.HyperViTMoE, Deeper)]
    Deeper.__qualname__ = "HyperViTMoE"
    tuning.check_project(tmp_path, "a", model=vits[0])
    with pytest.raises(ValueError, match=r"which differs in model\.space\.another\. Noth"):
        tuning.check_project(tmp_path, "a", model=vits[1])


def test_a_scope_that_no_value_activates_ends(tmp_path):
    def never(hp):
        hp.Choice("kind", ["one", "two"])
        with hp.conditional_scope("kind", ["one"]):
            hp.Choice("inner", ["a", "b"])
            with hp.conditional_scope("inner", ["c"]):
                hp.Choice("never", [1, 2])
        return build(hp)

    tuning.check_project(tmp_path, "a", hypermodel=never)
    space = json.loads((tmp_path / "a" / "search.json").read_text())["hypermodel"]["space"]
    assert set(space) == {"inner", "kind", "more", "never", "units"}


def test_what_cannot_be_written_down_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"`data.images` must be a JSON-like value"):
        tuning.check_project(tmp_path, "a", data={"images": object()})
    assert not list(tmp_path.iterdir())
