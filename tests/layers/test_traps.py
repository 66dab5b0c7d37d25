"""The traps that caught other implementations; each test's docstring says who was caught."""

import warnings

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import layers, routers
from tests import helpers

D = 4
DISPATCHERS = {  # none of which drops anything
    "walk": {"dispatch": "walk"},
    "dense": {"dispatch": "dense"},
    "capacity": {"capacity_factor": 9.0},
}


def tokens(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=(*shape, D)).astype("float32")


def make(layer, shape=(None, D)):
    layer.build(shape)
    helpers.randomize_weights(layer)
    return layer


def send_all_to(layer, *experts):
    """With inputs of ones, every token's choices are these experts, best first."""
    kernel = np.zeros(layer.router.kernel.shape, "float32")
    for place, expert in enumerate(experts):
        kernel[:, expert] = 2.0 - place
    layer.router.kernel.assign(kernel)


def numbers(scalars):
    return [float(ops.convert_to_numpy(scalar)) for scalar in scalars]


def make_identity_experts(layer):
    """Sets the weights of unbiased linear experts of hidden width d so that expert(x) = x."""
    for variable in layer.experts.trainable_variables:
        variable.assign(np.broadcast_to(np.eye(D, dtype="float32"), variable.shape))


def in_turns(num_experts):
    """A router kernel by which one-hot token n prefers experts n, n + 1, ... in turn."""
    return np.stack([np.roll(-np.arange(num_experts), n) for n in range(num_experts)])


# === Capacity ===


def test_capacity_is_enforced_exactly():
    """HF Switch v5.0 to 2026-08 (#48293) computed it and dropped nothing."""
    layer = make(layers.MoE(4, 5, top_k=1, capacity_factor=1.0))
    send_all_to(layer, 2)
    (outputs, routing), _ = helpers.call(layer, np.ones((12, D), "float32"), return_routing=True)
    np.testing.assert_array_equal(routing.kept[:, 0], np.arange(12) < 3)
    assert (outputs[:3] != 0).any(axis=-1).all()
    np.testing.assert_array_equal(outputs[3:], 0.0)


@pytest.mark.parametrize(("group", "kept_of_row"), [("batch", [4, 2, 0]), ("example", [2, 2, 2])])
def test_capacity_is_counted_over_the_right_axis(group, kept_of_row):
    """DeepSpeed #1658: over one sequence where the batch was meant."""
    layer = make(layers.MoE(2, 5, top_k=1, capacity_factor=1.0, capacity_group=group))
    send_all_to(layer, 1)
    (_, routing), _ = helpers.call(layer, np.ones((3, 4, D), "float32"), return_routing=True)
    np.testing.assert_array_equal(routing.kept[..., 0].sum(axis=1), kept_of_row)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_capacity_counts_k(top_k):
    """st-moe-pytorch dropped 37.5 % of a perfectly balanced routing at capacity factor 1."""
    layer = layers.MoE(D, 5, top_k=top_k, capacity_factor=1.0)
    make(layer).router.kernel.assign(in_turns(D))
    x = np.tile(np.eye(D, dtype="float32"), (3, 1))
    (_, routing), _ = helpers.call(layer, x, return_routing=True)
    np.testing.assert_array_equal(routing.load, np.full(D, 3 * top_k))
    assert routing.kept.all()


@pytest.mark.parametrize(("count", "factor"), [(5, 100.0), (2, 3.5)])
def test_capacity_larger_than_the_tokens(count, factor):
    """DeepSpeed #5353: a top-k over fewer tokens than slots fails."""
    limited = make(layers.MoE(7, 5, capacity_factor=factor))
    dropless = make(layers.MoE(7, 5))
    x = tokens(count)
    (outputs, routing), _ = helpers.call(limited, x, return_routing=True)
    assert routing.kept.all()
    helpers.assert_close(outputs, helpers.call(dropless, x)[0], "outputs")


@pytest.mark.parametrize(
    ("count", "num_experts", "factor", "slots"),
    [(2, 7, 1.0, 1), (1, 5, 0.1, 1), (7, 3, 1.0, 3), (10, 11, 1.1, 1), (10, 3, 0.9, 3)],
)
def test_capacity_of_sizes_that_do_not_divide(count, num_experts, factor, slots):
    """DeepSpeed #8155, and 1.1 * 10 / 11 is above 1 in floating point."""
    layer = make(layers.MoE(num_experts, 5, top_k=1, capacity_factor=factor))
    send_all_to(layer, 0)
    x = np.ones((count, D), "float32")
    (_, routing), _ = helpers.call(layer, x, return_routing=True)
    assert routing.kept.sum() == min(slots, count)


def test_positions_start_at_0():
    """The keras.io Switch example counts from 1 and wastes each expert's last slot."""
    layer = make(layers.MoE(D, 5, top_k=1, capacity_factor=1.0))
    layer.router.kernel.assign(np.eye(D))
    x = np.eye(D, dtype="float32")  # one token, one slot each
    (_, routing), _ = helpers.call(layer, x, return_routing=True)
    assert routing.kept.all()


def test_dropped_token_gives_exactly_0_and_gets_no_gradient():
    """HF #37017 scaled the token instead of dropping it."""
    layer = make(
        layers.MoE(2, 5, top_k=1, capacity_factor=0.5, balance_weight=0.0, z_loss_weight=0.0)
    )
    send_all_to(layer, 0)
    x = np.ones((8, D), "float32")
    outputs, _, gradients = helpers.values_and_gradients(layer, x, tokens(8))
    assert (outputs[:2] != 0).any(axis=-1).all()
    assert (outputs[2:] == 0).all()
    assert (gradients["inputs"][:2] != 0).any(axis=-1).all()
    assert (gradients["inputs"][2:] == 0).all()


def test_eval_capacity_factor_is_used_at_eval_only():
    """The keras.io Switch example never uses its capacity factor."""
    layer = make(layers.MoE(2, 5, top_k=1, capacity_factor=0.5, eval_capacity_factor=1.0))
    send_all_to(layer, 0)
    x = np.ones((8, D), "float32")
    for training, kept in [(True, 2), (False, 4)]:
        (_, routing), _ = helpers.call(layer, x, training=training, return_routing=True)
        assert routing.kept.sum() == kept


# === Losses ===


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_balance_minimum_does_not_depend_on_k(top_k):
    """HF #31464, MaxText, flaxformer: the minimum is k."""
    router = routers.TopKRouter(D, top_k)
    router.build((None, D))
    router.kernel.assign(in_turns(D))
    routing, _ = helpers.call(router, np.eye(D, dtype="float32"))
    assert routing.losses["balance"] == pytest.approx(1.0, rel=1e-6)


def test_balance_is_counted_before_drops():
    """Counted after drops (Megatron #1513), a full expert looks balanced."""
    limited = make(layers.MoE(4, 5, top_k=1, capacity_factor=0.25))
    dropless = make(layers.MoE(4, 5, top_k=1))
    x = tokens(16)
    (_, routing), losses = helpers.call(limited, x, return_routing=True)
    assert not routing.kept.all()
    assert routing.load.sum() == 16
    helpers.assert_close(losses, helpers.call(dropless, x)[1], "losses")


def test_losses_exclude_padding():
    """HF #28505: padding tokens, all alike, were counted."""
    layer = make(layers.MoE(4, 5))
    x, mask = tokens(2, 6), np.arange(6) < np.array([[4], [1]])
    real = x[mask][:, None]
    _, expected = helpers.call(layer, real)
    (_, routing), losses = helpers.call(layer, x, mask=mask, return_routing=True)
    helpers.assert_close(losses, expected, "losses")
    assert routing.load.sum() == 2 * 5


def test_z_loss_reads_logits():
    """HF Switch (#48293) fed it probabilities: a constant added to all logits changed nothing."""
    router = routers.TopKRouter(5)
    router.build((None, D))
    x = tokens(6)
    x[:, 0] = 1.0
    kernel = np.random.default_rng(0).normal(size=(D, 5)).astype("float32")
    before_and_after = []
    for shift in (0.0, 3.0):
        shifted = kernel.copy()
        shifted[0] += shift
        router.kernel.assign(shifted)
        routing, _ = helpers.call(router, x)
        logits = (x @ shifted).astype(np.float64)
        expected = np.mean(np.log(np.exp(logits).sum(axis=-1)) ** 2)
        assert routing.losses["z_loss"] == pytest.approx(expected, rel=1e-5)
        before_and_after.append(routing.losses["balance"])
    assert before_and_after[0] == pytest.approx(before_and_after[1], rel=1e-5)


@pytest.mark.parametrize("real", [0, 1, 5])
def test_z_loss_of_padding_is_0(real):
    """flaxformer adds (ln E)^2 for every padding token, whose logits are 0."""
    router = routers.TopKRouter(5)
    router.build((None, D))
    router.kernel.assign(np.zeros((D, 5)))
    routing, _ = helpers.call(router, tokens(5), mask=np.arange(5) < real)
    expected = np.log(5.0) ** 2 if real else 0.0
    assert routing.losses["z_loss"] == pytest.approx(expected, rel=1e-6)
    assert routing.losses["balance"] == pytest.approx(1.0 if real else 0.0, rel=1e-6)


def test_losses_do_not_accumulate_over_calls_nor_over_layers():
    """MegaBlocks #113: a module-global list of losses grows for ever and mixes models."""
    inputs = keras.Input((3, D))
    hidden = layers.MoE(3, 5, dispatch="dense", name="one")(inputs)
    outputs = layers.MoE(3, 5, dispatch="dense", name="two")(hidden)
    model = keras.Model(inputs, outputs)
    x = tokens(2, 3)
    model(x)
    first = numbers(model.losses)
    assert len(first) == 4
    model(x)
    assert numbers(model.losses) == pytest.approx(first, rel=1e-6)
    one, two = model.get_layer("one"), model.get_layer("two")
    assert len(one.losses) == len(two.losses) == 2
    assert numbers(one.losses + two.losses) == pytest.approx(first, rel=1e-6)


def test_losses_are_counted_once_in_the_objective():
    """Megatron #1330: twice, where the router ran again."""
    inputs = keras.Input((D,))
    layer = layers.MoE(3, 5, balance_weight=0.5, z_loss_weight=0.25)
    model = keras.Model(inputs, layer(inputs))
    model.compile(keras.optimizers.SGD(0.0), "mse", jit_compile=False)
    x, y = tokens(8), tokens(8, seed=1)
    outputs, losses = helpers.call(layer, x)
    expected = np.mean((outputs - y) ** 2) + np.sum(losses)
    for loss in (model.train_on_batch(x, y), model.test_on_batch(x, y)):
        assert float(loss) == pytest.approx(float(expected), rel=1e-5)


# === Noise ===


def test_jitter_is_multiplicative_and_in_its_bounds():
    """FastMoE and the keras.io Switch example add noise to the logits."""
    router = routers.SwitchRouter(D, jitter=0.1, seed=1)
    router.build((None, D))
    router.kernel.assign(np.eye(D))  # logits are the jittered inputs
    x = tokens(40)
    x[0] = 0.0
    routing, _ = helpers.call(router, x, training=True)
    np.testing.assert_array_equal(routing.logits[0], 0.0)
    ratio = routing.logits[1:] / x[1:]
    assert 0.9 - 1e-5 <= ratio.min() < 0.92
    assert 1.08 < ratio.max() <= 1.1 + 1e-5


def test_jitter_reaches_the_router_only():
    """HF #33969, #28077: the experts saw the noise too."""
    layer = make(
        layers.SwitchFFN(3, D, activation=None, use_bias=False, jitter=0.5, capacity_factor=None)
    )
    make_identity_experts(layer)
    x = tokens(9)
    (outputs, routing), _ = helpers.call(layer, x, training=True, return_routing=True)
    (_, quiet), _ = helpers.call(layer, x, training=False, return_routing=True)
    assert np.abs(routing.logits - quiet.logits).max() > 0.01
    helpers.assert_close(outputs, routing.weights * x, "outputs")


NOISY = {
    "moe": lambda: layers.MoE(3, 5, router=routers.TopKRouter(3, jitter=0.3), dropout=0.5),
    "switch_ffn": lambda: layers.SwitchFFN(3, 5, jitter=0.3, dropout=0.5),
    "soft_moe": lambda: layers.SoftMoE(3, 5, dropout=0.5),
    "mmoe": lambda: layers.MMoE(3, 5, tasks=2, dropout=0.5, gate_dropout=0.5),
}


@pytest.mark.parametrize("name", NOISY)
def test_nothing_is_random_at_eval(name):
    """DeepSpeed's top-2 draws its second expert at eval too."""
    layer = make(NOISY[name](), (None, 4, D))
    x = tokens(2, 4)
    quiet, noisy = helpers.Callable(layer, training=False), helpers.Callable(layer, training=True)
    once, trained, again = (keras.tree.flatten(call(x)[0]) for call in (quiet, noisy, quiet))
    for a, b, c in zip(once, again, trained, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.abs(a - c).max() > 1e-3, "there is noise in training"


# === Gates ===


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("top_k", [1, 2])
def test_gate_is_applied_once(dispatcher, top_k):
    """The keras.io Switch example multiplies by the gate in dispatch and in combine."""
    router = routers.TopKRouter(3, top_k, normalize=False)
    layer = make(
        layers.MoE(3, D, router=router, activation=None, use_bias=False, **DISPATCHERS[dispatcher])
    )
    make_identity_experts(layer)
    x = tokens(7)
    (outputs, routing), _ = helpers.call(layer, x, return_routing=True)
    gate = routing.weights.sum(axis=-1, keepdims=True)
    assert gate.max() < 0.999
    helpers.assert_close(outputs, gate * x, "outputs")


@pytest.mark.parametrize("router", ["top_k", "switch"])
def test_top_1_gate_gives_the_router_a_gradient(router):
    """minimind #858: renormalised to 1, the gate is a constant."""
    layer = make(layers.MoE(3, 5, top_k=1, router=router, balance_weight=0.0, z_loss_weight=0.0))
    x = tokens(7)
    (_, routing), _, gradients = helpers.values_and_gradients(
        layer, x, tokens(7, seed=1), lambda result: result[0], return_routing=True
    )
    assert np.abs(gradients["router/kernel"]).max() > 1e-3
    assert (routing.weights < 0.9999).any()


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-6])
def test_small_sigmoid_scores_cheat_no_loss(size):
    """Megatron #1545: an eps added to their sum lets a router lower its losses with its scores."""
    router = routers.TopKRouter(4, 2, score="sigmoid", losses=SIGMOID_LOSSES)
    router.build((None, D))
    # Logits far below 0: the scores are about `size`, in the same proportions.
    x = np.ones((6, D), "float32")
    kernel = np.tile(np.log(size) + np.log([0.4, 0.3, 0.2, 0.1]), (D, 1)) / D
    router.kernel.assign(kernel.astype("float32"))
    routing, _ = helpers.call(router, x)
    scores = 1.0 / (1.0 + np.exp(-kernel.sum(axis=0)))
    shares = scores / scores.sum()
    np.testing.assert_allclose(routing.weights.sum(axis=-1), 1.0, rtol=1e-5)
    # All tokens choose experts 0 and 1.
    assert routing.losses["balance"] == pytest.approx(4 * shares[:2].sum() / 2, rel=1e-4)
    assert routing.losses["sequence_balance"] == pytest.approx(routing.losses["balance"], rel=1e-5)


SIGMOID_LOSSES = {"sequence_balance": 1.0, "z_loss": 0.0}


# === Gradients that are not NaN ===

FINITE = {
    "moe_walk": lambda: layers.MoE(3, 5, dispatch="walk"),
    "moe_capacity": lambda: layers.MoE(3, 5, capacity_factor=1.0, experts="glu"),
    "moe_example": lambda: layers.MoE(3, 5, routing_level="example", dispatch="dense"),
    "soft_moe": lambda: layers.SoftMoE(3, 5, slots_per_expert=2),
    "mmoe": lambda: layers.MMoE(3, D, tasks=1, gate_units=[3]),
}


@pytest.mark.parametrize("name", FINITE)
def test_no_gradient_is_nan(name):
    """V-MoE (#218): (std / mean)^2 at balance; norms at zero vectors; 0 / 0 without a token."""
    layer = make(FINITE[name](), (None, 3, D))
    call = helpers.Differentiable(layer)
    x, all_real = tokens(2, 3), np.ones((2, 3), bool)

    def check(x, mask):
        outputs, losses, gradients = call(x, np.ones_like(x), mask=mask)
        for array in (*keras.tree.flatten(outputs), *losses, *gradients.values()):
            assert np.isfinite(array).all()
        return gradients

    check(np.zeros_like(x), all_real)
    check(1e-30 * x, all_real)
    one_token = all_real & (np.arange(6).reshape(2, 3) == 4)
    check(x, one_token)
    gradients = check(x, ~all_real)
    assert all((gradient == 0).all() for gradient in gradients.values())
    if hasattr(layer, "router"):
        for variable in layer.router.trainable_variables:
            variable.assign(np.zeros(variable.shape, "float32"))  # all experts alike
        check(x, all_real)


# === Initialisation ===


def std_of(variable):
    return float(np.std(ops.convert_to_numpy(variable)))


def assert_experts_differ(variable):
    kernels = ops.convert_to_numpy(variable)
    for a in range(len(kernels)):
        for b in range(a):
            assert np.abs(kernels[a] - kernels[b]).max() > 0.1 * np.std(kernels)


SEEDED = {
    "by_name": lambda: "glorot_uniform",
    "object": lambda: keras.initializers.GlorotUniform(),
    "seeded_object": lambda: keras.initializers.GlorotUniform(seed=7),
}


@pytest.mark.parametrize("initializer", SEEDED)
def test_experts_start_different_with_their_own_fans(initializer):
    """DeepCTR shares one seed; KerasHub counts E in the fan: std 0.011 for 0.0625 at E = 32."""
    layer = layers.MoE(32, 48, experts="glu", kernel_initializer=SEEDED[initializer]())
    layer.build((None, 16))
    bank = {helpers.path_of(layer, v): v for v in layer.trainable_variables}
    for name in ("kernel_0", "gate_kernel_0", "kernel_1"):
        kernel = bank[f"experts/{name}"]
        assert std_of(kernel) == pytest.approx((2 / (16 + 48)) ** 0.5, rel=0.05)
        assert_experts_differ(kernel)
    up, gate = (ops.convert_to_numpy(bank[f"experts/{n}"]) for n in ("kernel_0", "gate_kernel_0"))
    assert np.abs(up - gate).max() > 0.1


def test_shared_experts_differ_from_the_routed_ones():
    """One seeded initializer gives every bank the same numbers."""
    layer = layers.MoE(
        3, 8, num_shared_experts=3, kernel_initializer=keras.initializers.GlorotUniform(seed=7)
    )
    layer.build((None, D))
    weights = helpers.weights_of(layer)
    for name in ("kernel_0", "kernel_1"):
        assert np.abs(weights[f"experts/{name}"] - weights[f"shared_experts/{name}"]).max() > 0.1


def test_gate_layers_differ_from_the_experts():
    """The same for the hidden layers of MMoE's gates."""
    layer = layers.MMoE(
        3, [5], 3, gate_units=[5], kernel_initializer=keras.initializers.GlorotUniform(seed=7)
    )
    layer.build((None, D))
    weights = helpers.weights_of(layer)
    assert np.abs(weights["experts/kernel_0"] - weights["gate_hidden/kernel_0"]).max() > 0.1


def test_one_seed_gives_every_part_its_own_noise():
    """Dropout of routed and shared experts and the router's jitter must not be one mask."""
    layer = layers.MoE(4, 8, router="switch", num_shared_experts=1, dropout=0.5, seed=3)
    layer.build((None, D))
    states = [
        tuple(keras.ops.convert_to_numpy(v.value))
        for v in layer.non_trainable_variables
        if "seed_generator_state" in v.path
    ]
    assert len(states) == len(set(states)) == 3
    again = layers.MoE(4, 8, router="switch", num_shared_experts=1, dropout=0.5, seed=3)
    again.build((None, D))
    assert states == [
        tuple(keras.ops.convert_to_numpy(v.value))
        for v in again.non_trainable_variables
        if "seed_generator_state" in v.path
    ]


def test_soft_moe_and_mmoe_start_with_their_own_fans():
    """Keras counts every axis but the last two of `phi` and of stacked gates in the fan."""
    soft = layers.SoftMoE(16, 8, slots_per_expert=8)
    soft.build((None, None, 64))
    assert std_of(soft.router.phi) == pytest.approx(64**-0.5, rel=0.05)
    multi = layers.MMoE(32, [48], tasks=16, gate_units=[24])
    multi.build((None, 16))
    weights = {helpers.path_of(multi, v): v for v in multi.trainable_variables}
    for path, fans in [
        ("experts/kernel_0", 16 + 48),
        ("gate_hidden/kernel_0", 16 + 24),
        ("gates/kernel", 24 + 32),
    ]:
        assert std_of(weights[path]) == pytest.approx((2 / fans) ** 0.5, rel=0.05), path
        assert_experts_differ(weights[path])


@pytest.mark.parametrize("seed", [None, 7])
def test_copies_of_a_template_start_different(seed):
    """A copied layer with a seeded initializer is the same layer E times (DeepCTR)."""
    template = keras.layers.Dense(
        48, kernel_initializer=keras.initializers.GlorotUniform(seed=seed), activation="relu"
    )
    layer = layers.MoE(8, experts=template)
    layer.build((None, 48))
    kernels = np.stack([ops.convert_to_numpy(e.kernel) for e in layer.experts.experts])
    assert np.std(kernels) == pytest.approx((2 / 96) ** 0.5, rel=0.05)
    assert_experts_differ(kernels)


# === Precision ===


@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_router_stays_float32(policy):
    """bfloat16 logits change the choice of 1 to 5 % of tokens; the router is float32 by intent."""
    keras.config.set_dtype_policy(policy)
    layer = make(layers.MoE(5, 6))
    assert layer.compute_dtype != "float32"
    x = np.round(8 * tokens(9)) / 8  # exact in the compute dtype
    (_, routing), losses = helpers.call(layer, x.astype("float32"), return_routing=True)
    kernel = ops.convert_to_numpy(layer.router.kernel)
    assert routing.logits.dtype == routing.weights.dtype == routing.load.dtype == np.float32
    helpers.assert_close(routing.logits, x @ kernel, "logits", tolerance=1e-6)
    assert all(loss.dtype == np.float32 for loss in losses)


@pytest.mark.parametrize(
    ("policy", "step"), [("mixed_bfloat16", 2.0**-4), ("mixed_float16", 2.0**-7)]
)
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_sums_over_k_are_float32(policy, step, dispatcher):
    """Eight terms of 1 + step / 9 and one of -8: what is left lies below the compute dtype's ulp.

    The experts' outputs 9 + step and -72 are exact in it, their products with the gate 1/9 not.
    """
    layer = layers.MoE(9, 2, router="dense", dtype=policy, **DISPATCHERS[dispatcher])
    layer.build((None, D))
    for variable in layer.trainable_variables:
        variable.assign(np.zeros(variable.shape, "float32"))  # gates are 1/9, experts their bias
    bias = np.full((9, D), 9.0 + step, "float32")
    bias[4] = -72.0
    weights = {helpers.path_of(layer, v): v for v in layer.trainable_variables}
    weights["experts/bias_1"].assign(bias)
    outputs, _ = helpers.call(layer, tokens(3))
    np.testing.assert_allclose(outputs.astype("float32"), 8 * step / 9, rtol=0.01)


def test_int8_quantisation_leaves_the_router_alone():
    """KerasHub quantises the router, whose choices then change, and skips the experts.

    `Model.quantize` finds experts that are Keras layers; banks have no int8 form yet.
    """
    inputs = keras.Input((D,))
    layer = layers.MoE(3, experts=keras.layers.Dense(D), name="moe")
    model = keras.Model(inputs, layer(inputs))
    helpers.randomize_weights(layer)
    x = tokens(16)
    (_, before), _ = helpers.call(layer, x, return_routing=True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the router has no int8 form
        model.quantize("int8")
    kernels = [expert.kernel for expert in layer.experts.experts]
    assert {keras.backend.standardize_dtype(kernel.dtype) for kernel in kernels} == {"int8"}
    (outputs, after), _ = helpers.call(layer, x, return_routing=True)
    for name in ("experts", "weights", "logits"):
        np.testing.assert_array_equal(getattr(after, name), getattr(before, name))
    assert np.isfinite(outputs).all()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_int8_quantisation_says_that_it_skips_a_bank():
    """KerasHub's experts stay as they are, and nobody hears of it."""
    inputs = keras.Input((D,))
    layer = layers.MoE(3, 5, name="moe")
    model = keras.Model(inputs, layer(keras.layers.Dense(D)(inputs)))
    with pytest.warns(UserWarning) as caught:
        model.quantize("int8")
    said = [str(warning.message) for warning in caught]
    assert any("ExpertMLP" in message and "quantize" in message for message in said)
    dtypes = {
        helpers.path_of(layer, variable): keras.backend.standardize_dtype(variable.dtype)
        for variable in layer.trainable_variables
    }
    assert set(dtypes.values()) == {"float32"}, dtypes


# === Tests that can fail ===


@pytest.mark.parametrize("path", ["router/kernel", "experts/kernel_0", "experts/bias_1"])
def test_the_tolerance_can_fail(path):
    """FastMoE compares gradients with a tolerance that nothing exceeds."""
    layer, x = make(layers.MoE(3, 5)), tokens(7)
    expected, _ = helpers.call(layer, x)
    weight = next(v for v in layer.trainable_variables if helpers.path_of(layer, v) == path)
    weight.assign(ops.convert_to_numpy(weight) * (1 + 2e-4))
    outputs, _ = helpers.call(layer, x)
    with pytest.raises(AssertionError, match="relative error"):
        helpers.assert_close(outputs, expected, "outputs")
    with pytest.raises(AssertionError, match="relative error"):
        helpers.assert_close(outputs * np.nan, expected, "outputs")


# === Bad tokens ===


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_bad_token_stays_in_its_row(dispatcher):
    """A NaN times a gate of 0 is NaN: one-hot dispatch spreads it over the batch."""
    layer = make(layers.MoE(4, 5, num_shared_experts=1, **DISPATCHERS[dispatcher]))
    call = helpers.Callable(layer)
    x = tokens(9)
    expected, _ = call(x)
    for bad in (np.nan, np.inf, -np.inf):
        spoilt = x.copy()
        spoilt[4, 1] = bad
        outputs, _ = call(spoilt)
        assert not np.isfinite(outputs[4]).all()
        others = np.arange(9) != 4
        helpers.assert_close(outputs[others], expected[others], "other rows")
