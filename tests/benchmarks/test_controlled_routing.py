"""The benchmark's routing is the one it says."""

import keras
import numpy as np
import pytest

from benchmarks import controlled_routing as routing
from benchmarks import ours
from benchmarks.rows import Sizes

SIZES = Sizes(tokens=4000, width=8, hidden=4, experts=4, top_k=2)


def test_zipf_shares():
    np.testing.assert_allclose(routing.zipf_shares(3), np.array([6, 3, 2]) / 11)


def test_first_choices_follow_the_shares():
    shares = routing.zipf_shares(4)
    one = SIZES._replace(top_k=1)
    counts = routing.loads(routing.routed_inputs(one, shares), one)
    deviations = np.sqrt(one.tokens * shares * (1 - shares))
    assert (abs(counts - one.tokens * shares) < 4 * deviations).all()


def test_even_loads_are_even():
    inputs = routing.routed_inputs(SIZES, routing.even_shares(4))
    facts = routing.load_facts(inputs, SIZES)
    assert 1.0 <= facts["load_max_over_mean"] < 1.1
    assert facts["experts_used"] == 4


@pytest.mark.parametrize("shares", [routing.even_shares(4), routing.zipf_shares(4)])
def test_the_layer_routes_as_the_inputs_say(shares):
    sizes = SIZES._replace(tokens=64)
    inputs = routing.routed_inputs(sizes, shares)
    decision = ours.moe(sizes).router(inputs)
    chosen = keras.ops.convert_to_numpy(decision.experts)
    counts = np.bincount(chosen.ravel(), minlength=sizes.experts)
    np.testing.assert_array_equal(counts, routing.loads(inputs, sizes))


def test_more_experts_than_features_are_refused():
    with pytest.raises(ValueError, match="scores of 9 experts do not fit in tokens of width 8"):
        routing.routed_inputs(SIZES._replace(experts=9), routing.even_shares(9))
