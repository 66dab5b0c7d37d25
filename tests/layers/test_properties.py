"""What holds for any routing: properties checked on random inputs, skews and masks.

A layer is built and compiled once per test; hypothesis varies the numbers that go through it.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keras_moe import layers, routers
from keras_moe.dispatch import PaddedBlocksDispatcher
from tests import helpers
from tests.helpers import some_everywhere

few = settings(deadline=None, max_examples=10, derandomize=True)
seeds = st.integers(0, 2**16)
skews = st.sampled_from([0.0, 1.5, 20.0, -20.0])

B, S, D, E = 3, 4, 4, 5


def make(layer, shape=(None, S, D)):
    layer.build(shape)
    helpers.randomize_weights(layer)
    return layer


def draw_inputs(seed, skew=0.0, shape=(B, S, D)):
    """Random tokens, pushed along one direction so that experts become popular or empty."""
    rng = np.random.default_rng(seed)
    return (rng.normal(size=shape) + skew * np.eye(shape[-1])[0]).astype("float32")


def draw_mask(bits, shape=(B, S)):
    return np.array([bits >> i & 1 for i in range(int(np.prod(shape)))], bool).reshape(shape)


masks = st.integers(0, 2 ** (B * S) - 1)


@pytest.mark.parametrize("experts", ["mlp", "glu"])
def test_dispatchers_agree(experts):
    """Blocks of any size, all experts, and a capacity that holds everything: the same numbers."""
    dispatchers = [
        {"dispatch": "dense"},
        {"dispatch": PaddedBlocksDispatcher(block_size=3)},
        {"capacity_factor": E / 2},
    ]
    calls = []
    for arguments in dispatchers:
        layer = make(layers.MoE(E, 6, experts=experts, output_dim=3, **arguments))
        calls.append(helpers.Differentiable(layer))

    @few
    @given(seed=seeds, skew=skews, bits=masks)
    def check(seed, skew, bits):
        x, mask = draw_inputs(seed, skew), draw_mask(bits)
        cotangent = draw_inputs(seed + 1, shape=(B, S, 3))
        expected, *others = [call(x, cotangent, mask=mask) for call in calls]
        for outputs, losses, gradients in others:
            helpers.assert_close(outputs, expected[0], "outputs")
            helpers.assert_close(losses, expected[1], "losses")
            helpers.assert_all_close(gradients, expected[2])

    check()


@pytest.mark.parametrize("dispatch", ["walk", "dense"])
def test_permuting_tokens_permutes_outputs(dispatch):
    layer = make(layers.MoE(E, 6, dispatch=dispatch, num_shared_experts=1), (None, D))
    call = helpers.Callable(layer)

    @few
    @given(seed=seeds, skew=skews, order=st.permutations(range(11)))
    def check(seed, skew, order):
        x = draw_inputs(seed, skew, (11, D))
        (outputs, losses), (permuted, same_losses) = call(x), call(x[order])
        helpers.assert_close(permuted, outputs[order], "outputs")
        helpers.assert_close(same_losses, losses, "losses")

    check()


LAYERS = {
    "moe_walk": lambda: layers.MoE(E, 6, dispatch="walk", num_shared_experts=1),
    "moe_dense_dispatcher": lambda: layers.MoE(E, 6, dispatch="dense"),
    "moe_example": lambda: layers.MoE(E, 6, dispatch="walk", routing_level="example"),
    "moe_capacity": lambda: layers.MoE(E, 6, capacity_factor=2.5),
    "moe_dense_router": lambda: layers.MoE(3, 6, router="dense"),
    "soft_moe": lambda: layers.SoftMoE(3, 6, slots_per_expert=2),
    "mmoe": lambda: layers.MMoE(3, [6, D], tasks=2, gate_units=[5]),
}


@pytest.mark.parametrize(
    "name",
    some_everywhere(
        LAYERS.keys(),
        ["moe_walk", "moe_example", "moe_capacity", "soft_moe", "mmoe"],
        "all experts for all tokens, which mixes none",
    ),
)
def test_padding_of_garbage_changes_nothing(name):
    layer = make(LAYERS[name]())
    call = helpers.Differentiable(layer)
    outputs_per_call = getattr(layer, "num_tasks", 1)

    @few
    @given(seed=seeds, skew=skews, garbage=st.sampled_from([np.nan, np.inf, 1e30, 0.0]))
    def check(seed, skew, garbage):
        x = draw_inputs(seed, skew)
        cotangents = [draw_inputs(seed + 1 + i) for i in range(outputs_per_call)]
        pad = ((0, 0), (0, 2), (0, 0))
        padded = np.pad(x, pad, constant_values=np.float32(garbage))
        mask = np.broadcast_to(np.arange(S + 2) < S, (B, S + 2)).copy()
        outputs, losses, gradients = call(x, cotangents)
        with_padding, same_losses, same_gradients = call(
            padded, [np.pad(c, pad, constant_values=3.0) for c in cotangents], mask=mask
        )
        if outputs_per_call == 1:
            outputs, with_padding = [outputs], [with_padding]
        for plain, wide in zip(outputs, with_padding, strict=True):
            helpers.assert_close(wide[:, :S], plain, "outputs")
            assert (wide[:, S:] == 0).all()
        helpers.assert_close(same_losses, losses, "losses")
        assert (same_gradients["inputs"][:, S:] == 0).all()
        same_gradients["inputs"] = same_gradients["inputs"][:, :S]
        helpers.assert_all_close(same_gradients, gradients)

    check()


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_loads_sum_to_k_per_real_token(top_k):
    router = make(routers.TopKRouter(E, top_k), (None, D))
    call = helpers.Callable(router)

    @few
    @given(seed=seeds, skew=skews, bits=masks)
    def check(seed, skew, bits):
        mask = draw_mask(bits, (B * S,))
        routing, _ = call(draw_inputs(seed, skew, (B * S, D)), mask=mask)
        assert routing.load.sum() == top_k * mask.sum()
        np.testing.assert_array_equal(
            routing.load, np.bincount(routing.experts[mask].ravel(), minlength=E)
        )
        assert all(len(set(row)) == top_k for row in routing.experts)
        np.testing.assert_array_equal(routing.kept, np.repeat(mask[:, None], top_k, 1))

    check()


@pytest.mark.parametrize(("factor", "slots"), [(0.4, 2), (1.0, 5), (1.3, 7)])
def test_capacity_keeps_exactly_what_fits(factor, slots):
    """ceil(factor * 2 * 12 / 5) per expert, first choices first, then first come first served."""
    layer = make(layers.MoE(E, 6, capacity_factor=factor), (None, D))
    call = helpers.Callable(layer, return_routing=True)

    @few
    @given(seed=seeds, skew=skews, bits=masks)
    def check(seed, skew, bits):
        mask = draw_mask(bits, (B * S,))
        (_, routing), _ = call(draw_inputs(seed, skew, (B * S, D)), mask=mask)
        experts, kept = routing.experts, routing.kept
        assert not kept[~mask].any()
        np.testing.assert_array_equal(
            np.bincount(experts[kept], minlength=E), np.minimum(routing.load, slots)
        )
        for e in range(E):
            first, second = (experts[:, j] == e for j in (0, 1))
            if (mask & first & ~kept[:, 0]).any():
                assert not (second & kept[:, 1]).any(), "a first choice lost to a second one"
            for j, wants in enumerate((first, second)):
                fates = kept[mask & wants, j]  # kept ones come before dropped ones
                np.testing.assert_array_equal(fates, np.sort(fates)[::-1])

    check()


@pytest.mark.parametrize(("num_experts", "top_k"), [(2, 1), (3, 2), (5, 5), (7, 3)])
def test_balance_is_one_at_perfect_balance(num_experts, top_k):
    """Token n prefers experts n, n+1, ... in turn, so every load and mean probability is equal."""
    router = routers.TopKRouter(num_experts, top_k)
    router.build((None, num_experts))
    call = helpers.Callable(router)
    preference = np.stack([np.roll(-np.arange(num_experts), n) for n in range(num_experts)])

    @few
    @given(strength=st.floats(0.01, 30.0))
    def check(strength):
        router.kernel.assign((strength * preference).astype("float32"))
        routing, _ = call(np.tile(np.eye(num_experts, dtype="float32"), (3, 1)))
        np.testing.assert_array_equal(routing.load, np.full(num_experts, top_k * 3))
        assert routing.losses["balance"] == pytest.approx(1.0, rel=1e-6)

    check()


@pytest.mark.parametrize(
    "arguments",
    [
        {"dispatch": "walk"},
        {"dispatch": "dense"},
        {"capacity_factor": 0.6, "capacity_group": "example"},
        {"routing_level": "example", "dispatch": "walk"},
    ],
    ids=lambda arguments: "-".join(map(str, arguments.values())),
)
def test_an_example_does_not_see_the_others(arguments):
    layer = make(layers.MoE(E, 6, **arguments))
    call = helpers.Callable(layer, return_routing=True)

    @few
    @given(seed=seeds, skew=skews, other=st.sampled_from([1.0, 50.0]))
    def check(seed, skew, other):
        x = draw_inputs(seed, skew)
        elsewhere = other * draw_inputs(seed + 1, -skew)
        elsewhere[1] = x[1]
        (outputs, routing), _ = call(x)
        (outputs_elsewhere, routing_elsewhere), _ = call(elsewhere)
        np.testing.assert_array_equal(routing.kept[1], routing_elsewhere.kept[1])
        helpers.assert_close(outputs_elsewhere[1], outputs[1], "outputs")

    check()
