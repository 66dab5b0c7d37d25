"""Muon steps each expert's kernel as Keras's Muon steps that kernel alone; Adam takes the rest."""

import ast
import re
from pathlib import Path

import keras
import numpy as np
import pytest
from keras import ops

from keras_moe import layers, optimizers, routers

pytestmark = pytest.mark.one_backend("paths and shapes, and Keras's own optimizers")
PAGE = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()
RATE = 0.1
WIDTH = 5


def value_of(variable):
    return ops.convert_to_numpy(variable).copy()


def steps_of(optimizer, variables, gradients):
    """What one step subtracts from each variable."""
    before = [value_of(variable) for variable in variables]
    optimizer.apply([ops.convert_to_tensor(g) for g in gradients], variables)
    return [b - value_of(variable) for b, variable in zip(before, variables, strict=True)]


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


# === Which rule a weight gets ===


def by_muon(optimizer, layer):
    """The paths that do not get Adam's first step, which is the learning rate in every entry."""
    rng = np.random.default_rng(0)
    variables = layer.trainable_variables
    gradients = [
        (rng.uniform(1, 2, v.shape) * rng.choice([-1, 1], v.shape)).astype("float32")
        for v in variables
    ]
    steps = steps_of(optimizer, variables, gradients)
    return {
        variable.path.partition("/")[2]
        for variable, step in zip(variables, steps, strict=True)
        if not np.allclose(np.abs(step), RATE, rtol=1e-3)
    }


def built(layer, *shape):
    layer.build(shape or (2, 6, WIDTH))
    return layer


def attention():
    layer = keras.layers.MultiHeadAttention(2, 4, name="attention")
    layer.build((2, 6, WIDTH), (2, 6, WIDTH))
    return layer


def router_that_was_built_before():
    router = routers.TopKRouter(4)
    router.build((None, WIDTH))
    return built(layers.MoE(4, 8, router=router))


def moe(**arguments):
    return lambda: built(layers.MoE(4, 8, **arguments))


KERNELS = {"experts/kernel_0", "experts/kernel_1"}
CASES = {
    "mlp": (moe(), KERNELS),
    "named router": (moe(name="router"), KERNELS),
    "glu": (moe(experts="glu"), {*KERNELS, "experts/gate_kernel_0"}),
    "shared": (
        moe(num_shared_experts=1),
        {*KERNELS, "shared_experts/kernel_0", "shared_experts/kernel_1"},
    ),
    "own bank": (
        lambda: built(layers.MoE(4, experts=layers.ExpertMLP(4, [7, WIDTH], name="mine"))),
        KERNELS,
    ),
    "layers": (
        lambda: built(layers.MoE(2, experts=keras.layers.Dense(WIDTH))),
        {"experts/expert_0/kernel", "experts/expert_1/kernel"},
    ),
    **{
        name: (moe(router=name), KERNELS)
        for name in ("noisy_top_k", "dselect_k", "sigmoid_bias", "hash", "relu")
    },
    "built before": (router_that_was_built_before, KERNELS),
    "switch_ffn": (lambda: built(layers.SwitchFFN(4, 8)), KERNELS),
    "soft_moe": (lambda: built(layers.SoftMoE(4, 8, slots_per_expert=3)), KERNELS),
    "mmoe": (
        lambda: built(layers.MMoE(4, [8, 6], tasks=3, gate_units=[7])),
        {*KERNELS, "gate_hidden/kernel_0"},
    ),
    "bank": (lambda: built(layers.ExpertMLP(4, 8), 4, None, WIDTH), {"kernel_0"}),
    "dense": (lambda: built(keras.layers.Dense(4)), {"kernel"}),
    "attention": (attention, set()),
    "convolution": (lambda: built(keras.layers.Conv1D(4, 3)), set()),
    "embedding": (lambda: built(keras.layers.Embedding(7, 4), 2, 6), set()),
}


@pytest.mark.parametrize("case", CASES)
def test_which_weights_are_stepped_by_muon(case):
    make, expected = CASES[case]
    assert by_muon(optimizers.Muon(RATE, weight_decay=None, adam_weight_decay=None), make()) == (
        expected
    )


def test_banks_can_be_excluded():
    plain = {"weight_decay": None, "adam_weight_decay": None}
    layer = moe()()
    assert by_muon(optimizers.Muon(RATE, exclude_layers=["kernel_1"], **plain), layer) == {
        "experts/kernel_0"
    }
    embedding = moe(name="embedding_mixture")
    assert by_muon(optimizers.Muon(RATE, **plain), embedding()) == set()
    taken = by_muon(optimizers.Muon(RATE, exclude_embeddings=False, **plain), embedding())
    assert taken == KERNELS


def listed(argument):
    """The list that the page gives for an argument of Keras's optimizers."""
    found = re.search(rf"keras\.optimizers\.[^\]]*{argument}=(\[[^\]]*\])", PAGE)
    return ast.literal_eval(found[1])


@pytest.mark.parametrize("case", CASES)
def test_the_list_for_keras_own_muon(case):
    """Banks get Adam, as all weights of three axes do."""
    make, expected = CASES[case]
    hidden = {path for path in expected if not re.search(r"kernel_\d$", path)}
    optimizer = keras.optimizers.Muon(
        RATE, weight_decay=None, adam_weight_decay=None, exclude_layers=listed("exclude_layers")
    )
    # A mixture named "router" is all of it excluded.
    assert by_muon(optimizer, make()) == hidden


# === The step ===

ARGUMENTS = [
    {},
    {"nesterov": False, "momentum": 0.5, "ns_steps": 3},
    {"rms_rate": None},
    {"weight_decay": 0.2, "adam_weight_decay": 0.1, "adam_lr_ratio": 0.5},
    {"gradient_accumulation_steps": 2},
    {"use_ema": True, "ema_overwrite_frequency": 2},
]


everywhere = pytest.mark.every_backend


# A kernel of more rows than columns, and of fewer, which is transposed: one rule shows both.
@pytest.mark.parametrize(
    ("arguments", "width"),
    [
        pytest.param(
            each, width, marks=everywhere if width == 4 or not each else (), id=f"{each}-{width}"
        )
        for each in ARGUMENTS
        for width in (4, 7)
    ],
)
def test_a_bank_is_stepped_as_keras_does_with_each_kernel(arguments, width):
    bank = built(layers.ExpertMLP(9, width, activate_last=True), 9, None, WIDTH)
    variables = bank.trainable_variables
    alone = [[keras.Variable(v[expert]) for v in map(value_of, variables)] for expert in range(9)]
    ours = optimizers.Muon(RATE, **arguments)
    theirs = [keras.optimizers.Muon(RATE, **arguments) for _ in alone]
    for step in range(4):
        gradients = [10.0**step * normal(*v.shape, seed=step) for v in variables]
        steps_of(ours, variables, gradients)
        for expert, (optimizer, own) in enumerate(zip(theirs, alone, strict=True)):
            steps_of(optimizer, own, [g[expert] for g in gradients])
    for together, apart in zip(variables, zip(*alone, strict=True), strict=True):
        expected = np.stack([value_of(v) for v in apart])
        np.testing.assert_allclose(value_of(together), expected, rtol=1e-5, atol=1e-5)


def model_of(experts, optimizer):
    keras.utils.set_random_seed(0)
    inputs = keras.Input((6, WIDTH))
    mixture = layers.MoE(3, experts=experts, dispatch="dense", name="moe")
    outputs = keras.layers.Dense(2, name="last")(mixture(inputs))
    model = keras.Model(inputs, outputs)
    model.compile(optimizer, "mse")
    return model


DATA = normal(32, 6, WIDTH), normal(32, 6, 2, seed=1)
FIT = {"batch_size": 8, "epochs": 2, "shuffle": False, "verbose": 0}


@pytest.mark.parametrize(
    "arguments",
    [pytest.param({}, marks=everywhere), {"gradient_accumulation_steps": 2}],
    ids=str,
)
def test_fit_equals_that_of_keras_layers_as_experts(arguments):
    """Whose kernels have two axes, so that Keras's Muon takes one after the other."""
    excluded = [*listed("exclude_layers"), "last"]
    bank = model_of(
        layers.ExpertMLP(3, WIDTH), optimizers.Muon(0.02, exclude_layers=["last"], **arguments)
    )
    apart = model_of(
        keras.layers.Dense(WIDTH),
        keras.optimizers.Muon(0.02, exclude_layers=excluded, **arguments),
    )
    values = {v.path: value_of(v) for v in bank.trainable_variables}
    dense = apart.get_layer("moe").experts.experts
    for expert, layer in enumerate(dense):
        layer.kernel.assign(values["moe/experts/kernel_0"][expert])
        layer.bias.assign(values["moe/experts/bias_0"][expert])
    for variable in apart.trainable_variables:
        if variable.path in values:
            variable.assign(values[variable.path])
    losses = [model.fit(*DATA, **FIT).history["loss"] for model in (bank, apart)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert losses[0][1] < losses[0][0]
    together = value_of(bank.get_layer("moe").experts.trainable_variables[0])
    assert np.abs(together - values["moe/experts/kernel_0"]).max() > 0.01
    np.testing.assert_allclose(together, np.stack([value_of(e.kernel) for e in dense]), atol=2e-4)


@pytest.mark.every_backend
def test_training_goes_on_from_a_file(tmp_path):
    arguments = {"exclude_layers": ["last"], "gradient_accumulation_steps": 2, "ns_steps": 4}
    model = model_of(layers.ExpertMLP(3, WIDTH), optimizers.Muon(0.02, **arguments))
    model.fit(*DATA, **FIT)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert type(loaded.optimizer) is optimizers.Muon
    assert loaded.optimizer.get_config() == model.optimizer.get_config()
    for each in (model, loaded):
        each.fit(*DATA, **FIT)
    kept = [[*each.trainable_variables, *each.optimizer.variables] for each in (model, loaded)]
    for expected, variable in zip(*kept, strict=True):
        np.testing.assert_allclose(value_of(variable), value_of(expected), rtol=1e-6, atol=1e-7)


def test_the_config_makes_the_same_optimizer():
    optimizer = optimizers.Muon(0.3, exclude_layers=["last"])
    copy = keras.optimizers.deserialize(keras.optimizers.serialize(optimizer))
    assert type(copy) is optimizers.Muon
    assert copy.get_config() == optimizer.get_config()


@pytest.mark.every_backend
def test_a_loss_scale_may_be_around_it():
    scaled, plain = (
        model_of(layers.ExpertMLP(3, WIDTH), wrap(optimizers.Muon(0.02, exclude_layers=["last"])))
        for wrap in (
            lambda optimizer: keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=8.0),
            lambda optimizer: optimizer,
        )
    )
    losses = [model.fit(*DATA, **FIT).history["loss"] for model in (scaled, plain)]
    np.testing.assert_allclose(*losses, rtol=1e-4)


# === Rules that look at a variable as a whole ===


def two_experts():
    """A bank of two experts, and each expert's kernel on its own."""
    bank = built(layers.ExpertMLP(2, 4, use_bias=False), 2, None, WIDTH)
    (kernel,) = bank.trainable_variables
    kernel.assign(normal(2, WIDTH, 4, seed=3) * np.array([100.0, 1.0], "float32")[:, None, None])
    return kernel, [keras.Variable(matrix) for matrix in value_of(kernel)]


GRADIENT = normal(2, WIDTH, 4) * np.array([1000.0, 1.0], "float32")[:, None, None]


@pytest.mark.parametrize(
    ("optimizer", "is_by_variable"),
    [
        *((name, False) for name in ("SGD", "RMSprop", "Adam", "AdamW", "Adadelta", "Adagrad")),
        *((name, False) for name in ("Adamax", "Nadam", "Ftrl", "Lion")),
        ("Lamb", True),
        ("Adafactor", True),
    ],
)
def test_optimizers_that_take_a_bank_for_one_variable(optimizer, is_by_variable):
    kernel, alone = two_experts()
    make = getattr(keras.optimizers, optimizer)
    (together,) = steps_of(make(RATE), [kernel], [GRADIENT])
    apart = [
        steps_of(make(RATE), [matrix], [g])[0] for matrix, g in zip(alone, GRADIENT, strict=True)
    ]
    assert np.allclose(together[1], apart[1], rtol=1e-4, atol=1e-6) != is_by_variable
    assert (f"`{optimizer}`" in PAGE.partition("## LAMB")[2]) == is_by_variable


def test_clipnorm_takes_a_bank_for_one_variable():
    kernel, alone = two_experts()
    router = keras.Variable(normal(WIDTH, 2))
    gradients = [GRADIENT, normal(WIDTH, 2, seed=2)]
    unclipped = GRADIENT[1]

    def shares(**clip):
        """The share of expert 1's gradient, and of the router's, that its step is."""
        bank, routing = steps_of(keras.optimizers.SGD(1.0, **clip), [kernel, router], gradients)
        return np.median(bank[1] / unclipped), np.median(routing / gradients[1])

    of_expert, of_router = shares(clipnorm=1.0)
    assert of_expert < 0.01 * of_router  # for the sake of expert 0
    (own,) = steps_of(keras.optimizers.SGD(1.0, clipnorm=1.0), [alone[1]], [unclipped])
    assert np.median(own / unclipped) > 100 * of_expert
    of_expert, of_router = shares(global_clipnorm=1.0)
    assert of_expert == pytest.approx(of_router, rel=0.05)  # the direction is kept


def test_weight_decay_can_leave_out_biases_and_routers():
    layer = moe(router="noisy_top_k", experts="glu")()
    for variable in layer.trainable_variables:
        variable.assign(np.ones(variable.shape))
    optimizer = keras.optimizers.SGD(1.0, weight_decay=0.5)
    is_routing = re.compile(re.search(r're\.search\(r"([^"]*)"', PAGE)[1])
    optimizer.exclude_from_weight_decay(
        var_names=listed("var_names"),
        var_list=[v for v in layer.trainable_variables if is_routing.search(v.path)],
    )
    variables = layer.trainable_variables
    steps = steps_of(optimizer, variables, [np.zeros(v.shape, "float32") for v in variables])
    decayed = {
        variable.path.partition("/")[2]
        for variable, step in zip(variables, steps, strict=True)
        if np.abs(step).max() > 0
    }
    assert decayed == {*KERNELS, "experts/gate_kernel_0"}
