"""Which rows there are, and how they are asked for."""

import pytest

from benchmarks import run
from benchmarks.kinds import KINDS
from benchmarks.rows import ON_REQUEST, ROWS, select


def test_names_are_unique():
    names = [row.name for row in ROWS]
    assert len(set(names)) == len(names)


def test_each_kind_is_built_and_used():
    assert {row.kind for row in ROWS} == set(KINDS)


def test_groups_names_and_defaults():
    assert {row.group for row in select(None)} == {row.group for row in ROWS} - ON_REQUEST
    assert [row.sizes.tokens for row in select(["decode"])] == [1, 8, 64]
    (row,) = select(["gpu-32768-2048-1408-64-8"])
    assert row.dtype == "bfloat16"


def test_an_unknown_row_is_refused():
    with pytest.raises(ValueError, match=r"Unknown rows: \['fast'\]. Name groups, \['dropless'"):
        select(["decode", "fast"])


def test_the_command_refuses_it_too(capsys):
    with pytest.raises(SystemExit):
        run.parse_arguments(["--rows", "fast"])
    assert "Unknown rows: ['fast']" in capsys.readouterr().err


def test_a_file_for_two_backends_is_refused(capsys):
    with pytest.raises(SystemExit):
        run.parse_arguments(["--backend", "jax", "torch", "--out", "one.json"])
    assert "one --backend must be named" in capsys.readouterr().err


def test_quick_sizes_are_small_and_keep_the_rest():
    for row in ROWS:
        quick = row.quick()
        assert quick.sizes.tokens <= 64 and quick.sizes.experts <= 4
        assert (quick.name, quick.limits) == (row.name, row.limits)
