"""Every layer keeps the contract of `tests/contract.py`."""

import keras
import pytest

from keras_moe import layers
from tests import contract
from tests.contract import Case, D
from tests.helpers import some_everywhere

CASES = {
    "moe": Case(layers.MoE, {"num_experts": 4, "hidden_dim": 8}, 5, 2, losses=2),
    "moe_glu_shared": Case(
        layers.MoE,
        {"num_experts": 5, "hidden_dim": 8, "experts": "glu", "num_shared_experts": 2},
        13,
        2,
        losses=2,
    ),
    "moe_capacity": Case(
        layers.MoE,
        {"num_experts": 4, "hidden_dim": 8, "capacity_factor": 1.0},
        5,
        2,
        losses=2,
        is_rowwise=False,
        is_batchwise=False,
    ),
    "moe_capacity_per_example": Case(
        layers.MoE,
        {
            "num_experts": 4,
            "hidden_dim": 8,
            "capacity_factor": 1.0,
            "capacity_group": "example",
        },
        5,
        2,
        losses=2,
        is_rowwise=False,
    ),
    "moe_router_object": Case(
        layers.MoE,
        {
            "num_experts": 4,
            "hidden_dim": 8,
            "router": {
                "module": "keras_moe.routers.top_k",
                "class_name": "TopKRouter",
                "config": {"num_experts": 4, "top_k": 3, "normalize": False},
                "registered_name": "keras_moe>TopKRouter",
            },
            "dispatch": {
                "module": "keras_moe.dispatch.padded_blocks",
                "class_name": "PaddedBlocksDispatcher",
                "config": {"block_size": 3},
                "registered_name": "keras_moe>PaddedBlocksDispatcher",
            },
        },
        5,
        2,
        losses=2,
    ),
    "moe_weighed_inputs": Case(
        layers.MoE,
        {"num_experts": 4, "hidden_dim": 8, "weigh": "inputs", "capacity": 3},
        5,
        2,
        losses=2,
        is_rowwise=False,
        is_batchwise=False,
    ),
    "moe_router_bias": Case(
        layers.MoE,
        {
            "num_experts": 4,
            "hidden_dim": 8,
            "router": {
                "module": "keras_moe.routers.top_k",
                "class_name": "TopKRouter",
                "config": {"num_experts": 4, "use_bias": True},
                "registered_name": "keras_moe>TopKRouter",
            },
        },
        6,
        2,
        losses=2,
    ),
    "moe_dense": Case(
        layers.MoE, {"num_experts": 4, "hidden_dim": 8, "router": "dense"}, 5, 2, losses=1
    ),
    "moe_switch_dropless": Case(
        layers.MoE, {"num_experts": 4, "hidden_dim": 8, "router": "switch"}, 5, 2, 2, seeds=1
    ),
    "moe_noisy_top_k": Case(
        layers.MoE, {"num_experts": 4, "hidden_dim": 8, "router": "noisy_top_k"}, 6, 2, 2, seeds=1
    ),
    "moe_batch_priority": Case(
        layers.MoE,
        {"num_experts": 4, "hidden_dim": 8, "router": "batch_priority", "capacity_factor": 1.0},
        5,
        2,
        losses=2,
        seeds=1,
        is_rowwise=False,
        is_batchwise=False,
    ),
    "moe_no_token_left": Case(
        layers.MoE,
        {"num_experts": 4, "hidden_dim": 8, "router": "no_token_left", "capacity_factor": 0.5},
        5,
        2,
        losses=2,
        is_rowwise=False,
        is_batchwise=False,
    ),
    "moe_no_token_left_ample": Case(
        layers.MoE,
        {
            "num_experts": 4,
            "hidden_dim": 8,
            "router": {
                "module": "keras_moe.routers.no_token_left",
                "class_name": "NoTokenLeftRouter",
                "config": {"num_experts": 4, "top_k": 2, "capacity_factor": 4.0},
                "registered_name": "keras_moe>NoTokenLeftRouter",
            },
        },
        5,
        2,
        losses=2,
    ),
    "moe_all_losses": Case(
        layers.MoE,
        {
            "num_experts": 4,
            "hidden_dim": 8,
            "router": {
                "module": "keras_moe.routers.top_k",
                "class_name": "TopKRouter",
                "config": {
                    "num_experts": 4,
                    "losses": {
                        "sequence_balance": 0.1,
                        "local_entropy": 0.1,
                        "global_entropy": 0.1,
                    },
                },
                "registered_name": "keras_moe>TopKRouter",
            },
        },
        5,
        2,
        losses=5,
    ),
    "moe_sigmoid_bias": Case(
        layers.MoE, {"num_experts": 4, "hidden_dim": 8, "router": "sigmoid_bias"}, 5, 3
    ),
    "moe_sinkhorn": Case(
        layers.MoE, {"num_experts": 4, "hidden_dim": 8, "router": "sinkhorn"}, 5, 2
    ),
    "moe_relu": Case(
        layers.MoE, {"num_experts": 4, "hidden_dim": 8, "router": "relu"}, 5, 3, losses=1
    ),
    "moe_expert_choice": Case(
        layers.MoE,
        {"num_experts": 4, "hidden_dim": 8, "router": "expert_choice", "capacity_factor": 1.0},
        5,
        2,
        is_rowwise=False,
        is_batchwise=False,
    ),
    "moe_dselect_k": Case(
        layers.MoE, {"num_experts": 4, "hidden_dim": 8, "router": "dselect_k"}, 6, 2, losses=1
    ),
    "moe_hash": Case(layers.MoE, {"num_experts": 4, "hidden_dim": 8, "router": "hash"}, 4, 3),
    "moe_random": Case(
        layers.MoE, {"num_experts": 4, "hidden_dim": 8, "router": "random"}, 4, 3, seeds=1
    ),
    "moe_uniform": Case(layers.MoE, {"num_experts": 4, "hidden_dim": 8, "router": "uniform"}, 4, 2),
    "moe_example_level": Case(
        layers.MoE,
        {"num_experts": 4, "hidden_dim": 8, "routing_level": "example"},
        5,
        2,
        losses=2,
        is_rowwise=False,
        mixes_tokens=True,
    ),
    "moe_layer_template": Case(
        layers.MoE,
        {
            "num_experts": 3,
            "experts": {
                "module": "keras.layers",
                "class_name": "Dense",
                "config": {"units": D, "activation": "tanh"},
                "registered_name": None,
            },
        },
        7,
        2,
        losses=2,
    ),
    "moe_bank_object": Case(
        layers.MoE,
        {
            "num_experts": 3,
            "experts": {
                "module": "keras_moe.layers.expert_mlp",
                "class_name": "ExpertMLP",
                "config": {"num_experts": 3, "units": [8, 7, D]},
                "registered_name": "keras_moe>ExpertMLP",
            },
        },
        7,
        2,
        losses=2,
    ),
    "switch_ffn": Case(
        layers.SwitchFFN,
        {"num_experts": 4, "hidden_dim": 8},
        5,
        2,
        losses=1,
        seeds=1,
        is_rowwise=False,
        is_batchwise=False,
    ),
    "soft_moe": Case(
        layers.SoftMoE,
        {"num_experts": 4, "hidden_dim": 8, "slots_per_expert": 2},
        6,
        2,
        is_rowwise=False,
        mixes_tokens=True,
    ),
    "soft_moe_causal": Case(
        layers.SoftMoE,
        {"num_experts": 3, "hidden_dim": 8, "slots_per_expert": 2, "causal": True},
        6,
        2,
        is_rowwise=False,
        mixes_tokens=True,
    ),
    "soft_moe_soft_uniform": Case(
        layers.SoftMoE,
        {"num_experts": 4, "hidden_dim": 8, "mixing": "soft_uniform"},
        6,
        2,
        is_rowwise=False,
        mixes_tokens=True,
    ),
    "soft_moe_uniform_soft": Case(
        layers.SoftMoE,
        {"num_experts": 4, "hidden_dim": 8, "mixing": "uniform_soft"},
        6,
        2,
        is_rowwise=False,
        mixes_tokens=True,
    ),
    "soft_moe_uniform": Case(
        layers.SoftMoE,
        {"num_experts": 4, "hidden_dim": 8, "mixing": "uniform", "causal": True},
        4,
        2,
        is_rowwise=False,
        mixes_tokens=True,
    ),
    "mmoe_list": Case(
        layers.MMoE, {"num_experts": 4, "expert_units": [8, 5], "tasks": 3}, 5, 3, output_dim=5
    ),
    "mmoe_dict": Case(
        layers.MMoE,
        {
            "num_experts": 4,
            "expert_units": 5,
            "tasks": ["click", "like"],
            "gate_units": [7],
            "gate_use_bias": True,
        },
        6,
        3,
        output_dim=5,
    ),
}

# What a backend can break for one layer, router, dispatcher or kind of experts alone.
CHECKS_OF_ALL = [contract.check_padding_changes_nothing]
# JAX has symbols for unknown sizes. On TensorFlow `test_save_and_load` and `test_compiles_once.py`
# trace all cases with such sizes.
CHECKS_OF_SYMBOLS = [contract.check_inside_other_layers]
# Of these a compiled program takes a second for each case and call. PyTorch runs all of them; JAX
# and TensorFlow those of a case of each kind: layer, dispatcher, state and noise of a router.
CHECKS_OF_KINDS = [
    contract.check_keras_layer_test,
    contract.check_unknown_sizes,
    contract.check_any_rank,
    contract.check_empty_batch,
    contract.check_one_token_and_more_experts_than_tokens,
    contract.check_inference_is_deterministic,
    contract.check_examples_are_independent,
    contract.check_everything_masked,
    contract.check_padding_is_not_counted,
    contract.check_bad_row_stays_alone,
    contract.check_frozen,
    contract.check_mixed_precision,
    contract.check_pure_precision,
    contract.check_return_routing,
    contract.check_mask_goes_on,
]
# An export has other index arithmetic, in dispatchers and in routers that give places themselves.
CHECKS_OF_ARITHMETIC = [contract.check_exporting_changes_no_value]
KINDS = {
    "moe",
    "moe_capacity_per_example",
    "moe_noisy_top_k",
    "moe_sigmoid_bias",
    "moe_expert_choice",
    "moe_example_level",
    "moe_layer_template",
    "switch_ffn",
    "soft_moe_causal",
    "mmoe_list",
}
WITH_ARITHMETIC = KINDS | {
    "moe_router_object",
    "moe_capacity",
    "moe_weighed_inputs",
    "moe_batch_priority",
    "moe_no_token_left",
}
# Python that no backend sees.
CHECKS_OF_ONE_BACKEND = [
    contract.check_config_is_json,
    contract.check_experts_start_different,
    contract.check_bad_inputs,
]


def _marks(check, name):
    is_everywhere = (
        check in CHECKS_OF_ALL
        or (check in CHECKS_OF_SYMBOLS and keras.backend.backend() != "tensorflow")
        or (check in (*CHECKS_OF_SYMBOLS, *CHECKS_OF_KINDS) and name in KINDS)
        or (check in CHECKS_OF_ARITHMETIC and name in WITH_ARITHMETIC)
    )
    return () if is_everywhere else (pytest.mark.one_backend("see CHECKS_OF_KINDS"),)


# Only what applies is collected: no check passes because it had nothing to check.
APPLY = [
    pytest.param(
        check, case, id=f"{check.__name__.removeprefix('check_')}-{name}", marks=_marks(check, name)
    )
    for check in (
        *CHECKS_OF_ALL,
        *CHECKS_OF_SYMBOLS,
        *CHECKS_OF_KINDS,
        *CHECKS_OF_ARITHMETIC,
        *CHECKS_OF_ONE_BACKEND,
    )
    for name, case in CASES.items()
    if contract.applies(check, case)
]


@pytest.mark.parametrize(("check", "case"), APPLY)
def test_layer_contract(check, case):
    check(case)


def _arrays():
    x = contract.tokens(batch=7)
    return x, x.mean(axis=-1, keepdims=True)


class _Batches(keras.utils.PyDataset):
    def __len__(self):
        return 3

    def __getitem__(self, index):
        x, y = _arrays()
        return x[2 * index : 2 * index + 2 + index % 2], y[2 * index : 2 * index + 2 + index % 2]


class _EqualBatches(_Batches):
    """The first batch alone, twice: one program of XLA's in place of one for each size."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        return super().__getitem__(0)


def _generator():
    for _ in range(2):
        for index in range(3):
            yield _Batches()[index]


def _tf_data():
    import tensorflow as tf

    return tf.data.Dataset.from_tensor_slices(_arrays()).batch(3)


# JAX compiles anyway; torch compiles with inductor, a C++ compiler and a minute per layer.
COMPILED = {"jax": [True], "tensorflow": [True, False], "torch": [False]}


# TensorFlow traces each case for XLA, and runs the operations of each router without it in the
# oracles' tests: what it makes of them without XLA in a graph is of the kind of layer.
FITTED = [
    pytest.param(
        jit_compile,
        name,
        id=f"{jit_compile}-{name}",
        marks=()
        if jit_compile or name in KINDS
        else pytest.mark.one_backend("the same operations, traced for XLA"),
    )
    for jit_compile in COMPILED[keras.backend.backend()]
    for name in CASES
]


@pytest.mark.parametrize(("jit_compile", "name"), FITTED)
def test_fit(jit_compile, name):
    """XLA makes a program for each size of a batch; that it does needs no more than `KINDS`."""
    is_one_size = jit_compile and name not in KINDS
    contract.check_fit(CASES[name], jit_compile, _EqualBatches if is_one_size else _Batches)


# What data comes in is Keras's own; with unknown sizes it goes through a graph on TensorFlow.
@pytest.mark.parametrize(
    "name",
    some_everywhere(
        ["moe", "switch_ffn", "soft_moe", "mmoe_list"],
        ["moe", "mmoe_list"],
        "one output and several; data does not know the layer",
    ),
)
@pytest.mark.parametrize("data", [_generator, _tf_data])
@pytest.mark.filterwarnings("ignore:Your input ran out of data")
def test_fit_any_data(name, data):
    contract.check_fit(CASES[name], COMPILED[keras.backend.backend()][-1], data)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_save_and_load(case, tmp_path):
    contract.check_save_and_load(case, tmp_path / "model.keras")


@pytest.mark.parametrize(
    "case",
    some_everywhere(CASES, KINDS, "Keras writes and reads the weights of a `.keras` file alike"),
)
def test_weights_file(case, tmp_path):
    def model():
        inputs = keras.Input((None, D))
        return keras.Model(inputs, keras.tree.flatten(case.make()(inputs)))

    source, target, x = model(), model(), contract.tokens()
    source.save_weights(tmp_path / "model.weights.h5")
    target.load_weights(tmp_path / "model.weights.h5")
    loaded = target.predict_on_batch(x)
    contract.assert_same("loaded", loaded, source.predict_on_batch(x), rtol=0, atol=0)
