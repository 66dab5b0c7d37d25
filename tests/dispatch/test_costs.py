"""The planner's formulas by hand, and what it takes where."""

import keras
import pytest

from keras_moe import layers
from keras_moe.dispatch import DenseDispatcher, WalkDispatcher, choose, costs, native

UNIT = costs.Platform(read=10.0, copy=20.0, waste=5.0, start=3.0, lookup=2.0, dispatch=0.25)


@pytest.fixture(autouse=True)
def forgets_costs():
    choose._costs.cache_clear()
    yield
    choose._costs.cache_clear()


@pytest.fixture
def unit(monkeypatch):
    monkeypatch.setitem(costs._PLATFORMS, keras.backend.backend(), UNIT)


def predicted(num_tokens, num_experts, top_k, training=False, is_bank=True, grouped=False):
    return costs.dropless_costs(
        num_tokens, num_experts, top_k, training=training, is_bank=is_bank, grouped=grouped
    )


def test_by_hand(unit):
    """All experts are busy where all are chosen, and one where one token chooses one."""
    assert predicted(100, 4, 4) == pytest.approx(
        {"walk": 3 + 400 * 1.25 + 4 * 35, "dense": 4 * 110, "lookup": 400 * (11 + 800)}
    )
    assert predicted(1, 2, 1) == pytest.approx(
        {"walk": 3 + 1.25 + 1 * (10 + 20 + 1), "dense": 2 * 11, "lookup": 13}
    )
    assert costs.least_cost(1, 2, 1) == pytest.approx(1 + 10)
    assert costs.least_cost(3, 4, 1) == pytest.approx(3 + 10 * 4 * (1 - 0.75**3))


def test_what_is_not_possible_is_not_offered(unit):
    assert "lookup" not in predicted(8, 64, 2, training=True)
    assert set(predicted(8, 64, 2, is_bank=False)) == {"padded_blocks", "dense"}
    assert set(predicted(8, 64, 2, grouped=True)) == {"grouped", "dense", "lookup"}


def test_a_good_grouped_matmul_is_taken(monkeypatch):
    monkeypatch.setattr(native, "is_good", lambda dtype, is_known: True)
    plan = layers.MoE(64, 128).dispatch_plan(4096)
    assert plan.dispatcher == "grouped"
    assert plan.reason == "dropless, with the platform's own grouped matmul"
    assert (
        layers.MoE(4, experts=keras.layers.Dense(8)).dispatch_plan(4096).dispatcher
        == "padded_blocks"
    )


@pytest.mark.parametrize("tokens", [1, 8, 64, 4096])
def test_never_all_experts_where_few_are_chosen(tokens):
    for training in (False, True):
        plan = layers.MoE(64, 128, top_k=2).dispatch_plan(tokens, training=training)
        assert plan.dispatcher == ("lookup" if tokens == 1 and not training else "walk")
        assert 1.0 < plan.overhead < 2.5


def test_the_layer_does_what_the_plan_says(monkeypatch):
    taken = []
    for kind in (WalkDispatcher, DenseDispatcher):

        def spy(self, *args, place=kind.place, **kwargs):
            taken.append(self.name)
            return place(self, *args, **kwargs)

        monkeypatch.setattr(kind, "place", spy)
    for top_k, tokens in ((2, 40), (8, 40)):
        layer = layers.MoE(8, 16, top_k=top_k)
        layer(keras.ops.ones((tokens, 4)))
        assert taken.pop() == layer.dispatch_plan(tokens, training=False).dispatcher
    assert taken == []


@pytest.mark.parametrize(
    ("dispatch", "reason"),
    [
        ("walk", "asked for; dropless: each expert walks over its own rows"),
        ("lookup", "asked for; few tokens: the weights are taken to them"),
        ("dense", "asked for; all experts on all tokens in one matmul"),
    ],
)
def test_what_was_asked_for_is_said(dispatch, reason):
    assert layers.MoE(8, 16, dispatch=dispatch).dispatch_plan(64, training=False).reason == reason
