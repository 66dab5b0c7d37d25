"""The tuning example: what it trains is within the budget, and what it prints is in its files."""

import json
import warnings

import matplotlib.image
import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of keras-tuner's import
    import keras_tuner
    import tune_moe as example

from keras_moe.flops import active_flops


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """A search whose default is above the budget."""
    folder = tmp_path_factory.mktemp("tune")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(example, "BUDGET", 700_000)
        test = example.main(trials=4, epochs=2, folder=folder)
    files = sorted((folder / "search").glob("trial_*/trial.json"))
    return folder, test, [json.loads(file.read_text()) for file in files]


def test_trains_what_is_within_the_budget_and_nothing_else(ran):
    trials = ran[2]
    assert {trial["status"] for trial in trials} == {"COMPLETED", "FAILED"} and len(trials) == 4
    for trial in trials:
        hp = keras_tuner.HyperParameters.from_config(trial["hyperparameters"])
        is_within = active_flops(example.build(hp)) <= 700_000
        assert is_within == (trial["status"] == "COMPLETED")
        assert is_within or "above max_flops=700,000" in trial["message"]


def test_default_is_the_first_of_each_choice():
    hp = keras_tuner.HyperParameters()
    model = example.build(hp)
    assert hp.values == {
        "moe/num_experts": 8,
        "moe/top_k": 2,
        "moe/active_hidden_dim": 128,
        "moe/balance_weight": 0.01,
        "width": 32,
        "learning_rate": 0.003,
    }
    assert active_flops(model) < example.BUDGET


def test_compares_the_best_with_the_default(ran):
    assert list(ran[1]) == ["default", "best of the search"]
    assert min(ran[1].values()) > 0.15  # of ten classes


def test_page_and_picture_are_no_blank_sheets(ran):
    page = (ran[0] / "report.html").read_text(encoding="utf-8")
    assert "block_1_moe" in page and page.count("<img") > 2
    assert matplotlib.image.imread(ran[0] / "trials.png")[..., :3].std() > 0.05
