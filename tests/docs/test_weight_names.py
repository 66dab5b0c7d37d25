"""docs/design/architecture.md names every weight as layers make it."""

import re
from pathlib import Path

import keras
import pytest

from keras_moe import layers, routers
from tests.router_checks import every_router

PAGE = Path(__file__).parents[2] / "docs" / "design" / "architecture.md"
E, H, OUT = 8, 13, 17
# All sizes differ, so that a size tells its axis.
AXES = {
    11: "d",
    E: "E",
    H: "h",
    OUT: "out",
    7: "P",
    4: "T",
    23: "g",
    6: "k",
    18: "k log2 E",
    19: "V",
}


def moe_with(router, **arguments):
    return lambda: layers.MoE(E, H, router=router, output_dim=OUT, **arguments)


LAYERS = {
    "MoE": lambda: layers.MoE(E, H, output_dim=OUT),
    'MoE(experts="glu")': lambda: layers.MoE(E, H, output_dim=OUT, experts="glu"),
    "MoE(num_shared_experts=1)": lambda: layers.MoE(E, H, output_dim=OUT, num_shared_experts=1),
    "MoE(experts=Dense(out))": lambda: layers.MoE(E, experts=keras.layers.Dense(OUT)),
    "SwitchFFN": lambda: layers.SwitchFFN(E, H, output_dim=OUT),
    "SoftMoE": lambda: layers.SoftMoE(E, H, output_dim=OUT, slots_per_expert=7),
    "MMoE": lambda: layers.MMoE(E, [H, OUT], tasks=4),
    "MMoE(gate_units=[g])": lambda: layers.MMoE(E, [H, OUT], tasks=4, gate_units=[23]),
    "MMoE(gate_use_bias=True)": lambda: layers.MMoE(E, [H, OUT], tasks=4, gate_use_bias=True),
    "ExpertMLP": lambda: layers.ExpertMLP(E, [H, OUT]),
    **{name: moe_with(name) for name in ("switch", "dense", "uniform")},
    **{
        name: moe_with(name, top_k=6)
        for name in (
            "top_k",
            "noisy_top_k",
            "batch_priority",
            "no_token_left",
            "sigmoid_bias",
            "sinkhorn",
            "expert_choice",
            "relu",
            "dselect_k",
            "hash",
            "random",
        )
    },
    "TopKRouter(use_bias=True)": lambda: layers.MoE(
        E, H, router=routers.TopKRouter(E, use_bias=True)
    ),
    "DSelectKRouter(use_bias=True)": lambda: layers.MoE(
        E, H, router=routers.DSelectKRouter(E, 6, use_bias=True)
    ),
    "TokenHashRouter": lambda: layers.MoE(
        E, H, router=routers.TokenHashRouter(E, vocabulary_size=19)
    ),
}
ROUTERS = {name for name in LAYERS if name[0].islower() or "Router" in name}


def weights_of(name):
    """The weights that training changes, and the others, as the page writes them."""
    layer = LAYERS[name]()
    layer.build((E, None, 11) if name == "ExpertMLP" else (2, 6, 11))
    written = {True: set(), False: set()}
    for weight in layer.weights:
        path = re.sub(r"expert_\d", "expert_i", weight.path.partition("/")[2])
        axes = ", ".join(AXES.get(size, str(size)) for size in weight.shape)
        if path == "loss_weights":  # as many as are on
            axes = "losses"
        if name not in ROUTERS or path.startswith("router/"):
            written[weight.trainable].add(f"{path} ({axes})")
    return written[True], written[False]


def code_in(cell):
    return re.findall(r"`([^`]+)`", cell)


def rows_of_page():
    _, _, section = PAGE.read_text().partition("## Names of weights")
    section = section.partition("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| `")]
    return {
        name: (set(code_in(trained)), set(code_in(state)))
        for names, trained, state in (line[1:-1].split("|") for line in lines)
        for name in code_in(names)
    }


@pytest.mark.parametrize("name", LAYERS)
def test_weights_are_those_of_the_page(name):
    """Fails where a weight is renamed: saved files, layouts and checkpoints rely on the name."""
    assert rows_of_page()[name] == weights_of(name)


def test_the_page_lists_nothing_else():
    assert set(rows_of_page()) == set(LAYERS)


def test_every_router_is_listed():
    assert {type(LAYERS[name]().router).__name__ for name in ROUTERS} == set(every_router())
