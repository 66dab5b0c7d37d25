"""`python -m keras_moe.dispatch`: what each dispatcher costs here, and what "auto" takes."""

import re

import pytest

from keras_moe import layers
from keras_moe.dispatch.__main__ import main
from keras_moe.dispatch.choose import DISPATCHERS

SIZES = ["--tokens", "24", "--width", "8", "--hidden-dim", "16", "--experts", "4", "--rounds", "1"]


@pytest.mark.parametrize("factor", [None, 1.5])
def test_it_measures_what_can_run_and_says_what_cannot(factor, capsys):
    main([*SIZES, *([] if factor is None else ["--capacity-factor", str(factor)])])
    lines = capsys.readouterr().out.splitlines()
    rows = {
        line.split()[0]: line
        for line in lines
        if line.split()[:1] and line.split()[0] in DISPATCHERS
    }
    assert set(rows) == set(DISPATCHERS)
    needs_capacity = {"einsum", "slots"} if factor is None else set()
    for name, row in rows.items():
        times = re.findall(r"[\d.]+ ms +([\d.]+) x", row)
        if name in needs_capacity:
            assert not times and "capacity_factor" in row
        elif times:
            assert len(times) == 2 and all(float(time) >= 1 for time in times)
        else:  # a grouped matmul, on TensorFlow
            assert name == "grouped" and "cannot be used here" in row


def test_the_star_is_at_what_a_layer_takes(capsys):
    main(SIZES)
    out = capsys.readouterr().out
    layer = layers.MoE(4, 16)
    layer.build((None, 8))
    for training in (False, True):
        plan = layer.dispatch_plan(24, training=training)
        kind = "training" if training else "inference"
        assert f'"auto" in {kind}: {plan.dispatcher}. {plan.reason}' in out
        assert re.search(rf"^{plan.dispatcher} .* x\*", out, re.MULTILINE)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--tokens", "0"], "--tokens"),
        (["--experts", "2", "--top-k", "3"], "--top-k"),
        (["--capacity-factor", "-1"], "--capacity-factor"),
    ],
)
def test_bad_sizes_are_refused_by_name(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main(arguments)
    assert message in capsys.readouterr().err
