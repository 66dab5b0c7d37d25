"""Experts that a batch does not reach have a gradient of 0, and not none.

Without one PyTorch's optimizers leave a variable out: momentum and decay stop, and with
`gradient_accumulation_steps` what earlier batches gave is thrown away.
"""

import itertools

import keras
import numpy as np
import pytest

from keras_moe import layers
from tests.contract import arrays

D, E = 4, 3
OPTIMIZERS = {
    "accumulation": lambda: keras.optimizers.SGD(1.0, gradient_accumulation_steps=2),
    "momentum": lambda: keras.optimizers.SGD(0.5, momentum=0.9),
    "decay": lambda: keras.optimizers.AdamW(0.1, weight_decay=0.1),
}
BANKS = {
    "Keras layers": lambda: {"experts": keras.layers.Dense(D, kernel_initializer="ones")},
    "composite layers": lambda: {
        "experts": keras.Sequential(
            [keras.layers.Dense(5, kernel_initializer="ones"), keras.layers.Dense(D)]
        )
    },
    "bank": lambda: {"hidden_dim": 5, "kernel_initializer": "ones"},
}


def trained(optimizer, bank, **arguments):
    """The experts' weights after two batches, the first for expert 0 alone, the second for 1."""
    keras.utils.set_random_seed(3)
    layer = layers.MoE(E, top_k=1, **BANKS[bank](), **arguments)
    inputs = keras.Input((D,))
    model = keras.Model(inputs, layer(inputs))
    layer.router.kernel.assign(np.eye(D, E) * 9.0)
    layer.router.trainable = False
    model.compile(OPTIMIZERS[optimizer](), "mse")
    x = np.full((8, D), 0.1, "float32")
    x[:4, 0], x[4:, 1] = 1.0, 1.0
    before = [arrays(v)[0].copy() for v in layer.experts.trainable_variables]
    for _ in range(2):
        model.fit(x, x, batch_size=4, shuffle=False, verbose=0)
    after = [arrays(v)[0] for v in layer.experts.trainable_variables]
    return before, after


OPTIMIZED = list(itertools.product(OPTIMIZERS, BANKS, ["walk", "lookup"]))
# Elsewhere a gradient is never missing: each kind of experts and each dispatch show it once.
EVERYWHERE = [("accumulation", "Keras layers", "lookup"), ("accumulation", "bank", "walk")]


@pytest.mark.one_backend("PyTorch alone leaves gradients out")
@pytest.mark.parametrize(
    ("optimizer", "bank", "dispatch"),
    [
        pytest.param(*each, marks=[pytest.mark.every_backend] if each in EVERYWHERE else [])
        for each in OPTIMIZED
    ],
)
def test_trains_as_if_all_experts_were_computed(optimizer, bank, dispatch):
    before, after = trained(optimizer, bank, dispatch=dispatch)
    _, expected = trained(optimizer, bank, dispatch="dense")
    assert any(not np.array_equal(a, b) for a, b in zip(before, after, strict=True))
    for a, b in zip(after, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bank", BANKS)
@pytest.mark.parametrize("dispatch", ["auto", "walk", "lookup", "dense"])
def test_every_weight_has_a_gradient(bank, dispatch):
    """Also where the batch is empty, and where it goes to one expert."""
    if keras.backend.backend() != "torch":
        pytest.skip("of PyTorch: elsewhere a gradient is never missing")
    for count in (0, 1):
        layer = layers.MoE(E, top_k=1, dispatch=dispatch, **BANKS[bank]())
        layer(np.ones((count, D), "float32"), training=True).sum().backward()
        for variable in layer.experts.trainable_variables:
            assert variable.value.grad is not None, variable.path
