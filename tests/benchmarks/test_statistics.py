"""Paired statistics, by hand."""

import pytest

from benchmarks.statistics import Summary, paired_ratio, summarize


def test_quartiles_of_four_samples():
    assert summarize([4.0, 1.0, 3.0, 2.0]) == Summary(2.5, 1.75, 3.25, 4)


def test_the_ratio_is_taken_within_rounds():
    # The machine is three times as slow in the last round, for both: the ratio is 2 all the same.
    assert paired_ratio([2.0, 2.0, 6.0], [1.0, 1.0, 3.0]) == Summary(2.0, 2.0, 2.0, 3)
    # The median of ratios 1, 4, 3; the ratio of medians would be 2.
    assert paired_ratio([2.0, 4.0, 9.0], [2.0, 1.0, 3.0]).median == 3.0


def test_a_round_counts_only_if_both_took_part():
    summary = paired_ratio([3.0, None, 8.0, 100.0], [1.0, 1.0, 2.0, None])
    assert summary == Summary(3.5, 3.25, 3.75, 2)


def test_rounds_must_match():
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio([1.0, 2.0], [1.0])


def test_no_common_round_is_an_error():
    with pytest.raises(ValueError, match="no samples to summarize"):
        paired_ratio([None, 1.0], [1.0, None])


@pytest.mark.parametrize("sample", [0.0, -1.0, float("nan"), float("inf")])
def test_a_sample_that_is_no_time_is_an_error(sample):
    with pytest.raises(ValueError, match="must be positive and finite"):
        summarize([1.0, sample])
