"""What docs/choosing.md says of each router is so."""

import re
from pathlib import Path

import numpy as np
import pytest
from keras import ops

from keras_moe import layers
from keras_moe.routers import registry

PAGE = Path(__file__).parents[2] / "docs" / "choosing.md"
RNG = np.random.default_rng(0)
FIRST = RNG.normal(size=(1, 12, 8)).astype("float32")
OTHER = np.concatenate([FIRST[:, :6], RNG.normal(size=(1, 6, 8)).astype("float32")], axis=1)


def rows():
    text = PAGE.read_text().split("<!-- routers: tested -->")[1].split("<!-- /routers -->")[0]
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    return {cells[0].strip("`"): cells[1:] for cells in map(cells_of, lines)}


def cells_of(line):
    return [cell.strip() for cell in line.strip("|").split("|")]


ROWS = rows()


def layer_of(router, **more):
    if router == "no_token_left":
        more = {"capacity_factor": 0.5}
    layer = layers.MoE(4, 8, router=router, seed=1, **more)
    layer.build(FIRST.shape)
    return layer


def is_moved(layer, training):
    """Whether the first half of the tokens is routed otherwise beside another second half."""
    routes = []
    before = [(variable, ops.convert_to_numpy(variable).copy()) for variable in layer.variables]
    for x in (FIRST, OTHER):
        _, routing = layer(x, training=training, return_routing=True)
        routes.append([ops.convert_to_numpy(routing.by_token()[name])[0, :6] for name in FIELDS])
        for variable, value in before:  # the same noise
            variable.assign(value)
    return not all(np.allclose(*pair, atol=1e-6) for pair in zip(*routes, strict=True))


FIELDS = ("experts", "weights", "kept")


def test_every_router_that_has_a_name_is_there():
    assert set(ROWS) == set(registry.NAMED_ROUTERS)


@pytest.mark.parametrize("router", ROWS)
def test_what_the_page_says_of_a_router(router):
    inference, training, state, decoder, _ = ROWS[router]
    layer = layer_of(router)
    assert is_moved(layer, False) == (inference == "yes")
    assert is_moved(layer, True) == (training == "yes")
    weights = {weight.name for weight in layer.router.non_trainable_variables}
    weights -= {"seed_generator_state"}
    assert weights == set(re.findall(r"`(\w+)`", state))
    assert (layer.router.looks_ahead(has_capacity=False) is None) == (decoder == "yes")


def test_with_a_capacity_tokens_compete():
    layer = layer_of("top_k", top_k=2, capacity_factor=0.5)
    assert is_moved(layer, False)
    assert layer.router.looks_ahead(has_capacity=True) is not None
    layer = layer_of("switch", capacity_factor=0.5)
    assert layer.router.looks_ahead(has_capacity=True) is None
    assert not is_moved(layer, False)  # earlier tokens win
