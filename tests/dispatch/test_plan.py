"""The index arithmetic of dispatch against brute force."""

from unittest import mock

import keras
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from keras import ops

from keras_moe.dispatch import plan

slow = settings(deadline=None, max_examples=12, derandomize=True)


def as_tensor(values):
    return ops.convert_to_tensor(np.asarray(values, "int32"))


def to_numpy(structure):
    return keras.tree.map_structure(ops.convert_to_numpy, structure)


def brute_bins(bin_of, num_bins):
    """The assignments of each bin, in order of arrival."""
    return [[a for a, b in enumerate(bin_of) if b == wanted] for wanted in range(num_bins)]


def check_bins(bins, bin_of, num_bins):
    members = brute_bins(bin_of, num_bins)
    nowhere = [a for a, b in enumerate(bin_of) if b == num_bins]
    flat = [a for bin_members in members for a in bin_members]
    np.testing.assert_array_equal(bins.order, [*flat, *nowhere])
    np.testing.assert_array_equal(bins.counts, [len(m) for m in members])
    np.testing.assert_array_equal(bins.edges, np.cumsum([0, *map(len, members)]))
    np.testing.assert_array_equal(bins.rank[bins.order], np.arange(len(bin_of)))
    np.testing.assert_array_equal(bins.bin_of, bin_of)
    for b, bin_members in enumerate(members):
        for place, a in enumerate(bin_members):
            assert bins.rank[a] - bins.edges[b] == place, (b, a)
    assert all(np.asarray(part).dtype == np.int32 for part in bins)


# Few sizes, so that few programs are compiled; the numbers vary.
SIZES = [(1, 1), (9, 4), (16, 3), (5, 7)]


@st.composite
def assignments(draw):
    total, num_bins = draw(st.sampled_from(SIZES))
    some = draw(st.lists(st.integers(0, num_bins), min_size=1, max_size=3))  # few bins in use
    any_bin = st.integers(0, num_bins) if draw(st.booleans()) else st.sampled_from(some)
    return draw(st.lists(any_bin, min_size=total, max_size=total)), num_bins


@pytest.mark.parametrize("fallback", [False, True])
@slow
@given(case=assignments())
def test_sort_into_bins(fallback, case):
    bin_of, num_bins = case
    sort = plan._sort

    def sort_of_large_range(bin_of, total, num_bins):
        return sort(bin_of, total, 2**31)  # the packed key would overflow int32

    with mock.patch.object(plan, "_sort", sort_of_large_range if fallback else sort):
        bins = to_numpy(plan.sort_into_bins(as_tensor(bin_of), num_bins))
    check_bins(bins, bin_of, num_bins)


def test_large_key_ranges_take_argsort():
    """(num_bins + 1) * total past int32: a packed key would wrap around and sort wrongly."""
    keys = np.array([2**27, 5, 2**27, 0, 5, 2**20] * 4, "int32")
    values, order = to_numpy(plan._sort(as_tensor(keys), len(keys), 2**27))
    expected = np.argsort(keys, kind="stable")
    np.testing.assert_array_equal(order, expected)
    np.testing.assert_array_equal(values, keys[expected])


@pytest.mark.parametrize("num_bins", [6, 1000])
def test_largest_packed_key(num_bins):
    keys = np.array([num_bins, 0, num_bins, num_bins - 1, 0], "int32")
    values, order = to_numpy(plan._sort(as_tensor(keys), len(keys), num_bins))
    np.testing.assert_array_equal(order, [1, 4, 3, 0, 2])
    np.testing.assert_array_equal(values, np.sort(keys))


def test_zero_assignments():
    bins = plan.sort_into_bins(as_tensor(np.zeros(0)), 3)
    np.testing.assert_array_equal(to_numpy(bins.counts), [0, 0, 0])
    slots = to_numpy(plan.capacity_slots(bins, 2))
    np.testing.assert_array_equal(slots.assignment, np.zeros(6))  # A = 0: all empty
    assert slots.slot_of.shape == (0,)
    slots, _ = to_numpy(plan.block_slots(bins, 2, 4))
    np.testing.assert_array_equal(slots.assignment, np.zeros(8))
    assert slots.slot_of.shape == (0,)


@slow
@given(case=assignments(), capacity=st.sampled_from([1, 2, 5]))
def test_capacity_slots(case, capacity):
    bin_of, num_bins = case
    total, num_slots = len(bin_of), num_bins * capacity
    bins = plan.sort_into_bins(as_tensor(bin_of), num_bins)
    slots = to_numpy(plan.capacity_slots(bins, capacity))
    assignment = np.full(num_slots, total)
    slot_of = np.full(total, num_slots)
    for b, members in enumerate(brute_bins(bin_of, num_bins)):
        for place, a in enumerate(members[:capacity]):
            assignment[b * capacity + place] = a
            slot_of[a] = b * capacity + place
    np.testing.assert_array_equal(slots.assignment, assignment)
    np.testing.assert_array_equal(slots.slot_of, slot_of)


@slow
@given(case=assignments(), block_size=st.sampled_from([1, 3, 8]))
def test_block_slots(case, block_size):
    bin_of, num_bins = case
    total = len(bin_of)
    num_blocks = min(total, (total + num_bins * (block_size - 1)) // block_size)
    bins = plan.sort_into_bins(as_tensor(bin_of), num_bins)
    slots, bin_of_block = to_numpy(plan.block_slots(bins, num_blocks, block_size))
    assignment, owners = [], []
    slot_of = np.full(total, num_blocks * block_size)
    for b, members in enumerate(brute_bins(bin_of, num_bins)):
        for start in range(0, len(members), block_size):
            block = members[start : start + block_size]
            for place, a in enumerate(block):
                slot_of[a] = len(assignment) + place
            assignment += [*block, *[total] * (block_size - len(block))]
            owners.append(b)
    assert len(owners) <= num_blocks, "the bound is a bound"
    np.testing.assert_array_equal(bin_of_block[: len(owners)], owners)
    assert ((bin_of_block >= 0) & (bin_of_block < num_bins)).all()
    assignment += [total] * (num_blocks * block_size - len(assignment))
    np.testing.assert_array_equal(slots.assignment, assignment)
    np.testing.assert_array_equal(slots.slot_of, slot_of)


@pytest.mark.one_backend("arithmetic of integers")
@pytest.mark.parametrize("num_bins", [1, 3, 7])
@pytest.mark.parametrize("block_size", [1, 3, 8])
def test_blocks_needed_is_tight(num_bins, block_size):
    """Some counts need just as many blocks as are reserved, none needs more."""
    from keras_moe.dispatch.padded_blocks import blocks_needed

    for total in range(1, 12):
        most = max(
            sum(-(-count // block_size) for count in counts)
            for counts in _compositions(total, min(num_bins, 3))
        )
        assert most <= blocks_needed(total, num_bins, block_size)
        if num_bins <= 3:
            assert most == blocks_needed(total, num_bins, block_size)


def _compositions(total, parts):
    if parts == 1:
        return [(total,)]
    return [(n, *rest) for n in range(total + 1) for rest in _compositions(total - n, parts - 1)]
