"""What watching costs is measured on models that differ in watching alone."""

import re

import numpy as np

from benchmarks import watching


def test_the_one_counts_and_the_other_does_not():
    x = np.random.default_rng(0).normal(size=(2, 4, 8)).astype("float32")
    counting, silent = watching.block(watching.QUICK), watching.block(watching.QUICK)
    silent.set_weights(counting.get_weights())
    watching.without_counts(silent)
    outputs = [np.asarray(model(x, training=True)) for model in (counting, silent)]
    np.testing.assert_array_equal(*outputs)
    decisions = [
        model.get_layer("moe").running_counts()["decisions"] for model in (counting, silent)
    ]
    assert decisions == [8, 0]


def test_it_runs_and_prints_its_table(capsys):
    assert watching.main(["--quick", "--rounds", "3", "--fit-rounds", "3"]) == 0
    shown = capsys.readouterr().out
    for what in (
        "running counts",
        "a callback that does nothing",
        r"ExpertMonitor\(\)",
        r"ExpertMonitor\(every=1\)",
    ):
        assert re.search(
            rf"\| {what} \| \d+\.\d+ \| \d+\.\d+ to \d+\.\d+ \| 3 \| (yes|no) \|", shown
        )
