"""Parity with other implementations: values and all gradients, from `tests/data`.

The largest relative error per reference is recorded as the property `parity_error` and printed at
the end of the module (`pytest -s` shows it).
"""

from pathlib import Path

import keras
import numpy as np
import pytest

from keras_moe import layers
from tests import helpers

DATA = Path(__file__).parents[1] / "data"
_errors: dict[str, float] = {}


@pytest.fixture(scope="module", autouse=True)
def _table():
    yield
    print(f"\nlargest relative parity error on {keras.backend.backend()}")
    for reference, error in sorted(_errors.items()):
        print(f"  {reference:36s} {error:.2e}")


@pytest.fixture
def compare(record_property, request):
    """Compares dicts of arrays with the reference's to 1e-5, and remembers the largest error."""

    def compare_all(actual, expected):
        error = helpers.assert_all_close(actual, expected)
        name = request.node.name.removeprefix("test_")
        _errors[name] = max(_errors.get(name, 0.0), error)
        record_property("parity_error", _errors[name])

    return compare_all


def load(file, prefix=""):
    """The arrays whose key starts with `prefix`, without it."""
    with np.load(DATA / file) as data:
        return {key[len(prefix) :]: data[key] for key in data.files if key.startswith(prefix)}


def gelu_tanh(x):
    return keras.activations.gelu(x, approximate=True)


def under_names_of(reference, names, prefix="grad_"):
    return {ours: reference[f"{prefix}{theirs}"] for ours, theirs in names.items()}


SOFT_NAMES = {
    "router/phi": "phi",
    "router/scale": "scale",
    "experts/kernel_0": "expert_kernel_0",
    "experts/bias_0": "expert_bias_0",
    "experts/kernel_1": "expert_kernel_1",
    "experts/bias_1": "expert_bias_1",
}


@pytest.mark.parametrize("slots", [1, 2])
def test_soft_moe_vmoe(slots, compare):
    ref = load("soft_moe_vmoe.npz", f"slots{slots}/")
    width, num_experts, per_expert = ref["phi"].shape
    assert per_expert == slots
    layer = layers.SoftMoE(
        num_experts,
        ref["expert_bias_0"].shape[-1],
        slots_per_expert=slots,
        activation=gelu_tanh,
    )
    layer.build((None, None, width))
    helpers.set_weights(layer, under_names_of(ref, SOFT_NAMES, prefix=""))
    (outputs, routing), _, gradients = helpers.values_and_gradients(
        layer, ref["inputs"], ref["cotangent"], lambda result: result[0], return_routing=True
    )
    compare(
        {
            "outputs": outputs,
            "logits": routing.logits,
            "dispatch": routing.dispatch,
            "combine": routing.combine,
        },
        {
            "outputs": ref["outputs"],
            "logits": ref["logits"],
            "dispatch": ref["dispatch_weights"],
            "combine": ref["combine_weights"],
        },
    )
    compare(gradients, under_names_of(ref, {"inputs": "inputs", **SOFT_NAMES}))


MIXTRAL_NAMES = {
    "router/kernel": "router_kernel",
    "experts/gate_kernel_0": "expert_gate_kernel",
    "experts/kernel_0": "expert_up_kernel",
    "experts/kernel_1": "expert_down_kernel",
}


def mixtral(ref, **losses):
    layer = layers.MoE(
        5,
        ref["expert_up_kernel"].shape[-1],
        top_k=2,
        experts="glu",
        activation="silu",
        use_bias=False,
        **{"balance_weight": 0.0, "z_loss_weight": 0.0, **losses},
    )
    layer.build(ref["inputs"].shape)
    helpers.set_weights(layer, under_names_of(ref, MIXTRAL_NAMES, prefix=""))
    return layer


def test_mixtral_hf(compare):
    ref = load("mixtral_hf.npz")
    (outputs, routing), losses, gradients = helpers.values_and_gradients(
        mixtral(ref), ref["inputs"], ref["cotangent"], lambda result: result[0], return_routing=True
    )
    assert losses == []
    np.testing.assert_array_equal(routing.experts, ref["topk_indices"])
    compare(
        {"outputs": outputs, "logits": routing.logits, "weights": routing.weights},
        {
            "outputs": ref["outputs"],
            "logits": ref["router_logits"],
            "weights": ref["topk_weights"],
        },
    )
    compare(gradients, under_names_of(ref, {"inputs": "inputs", **MIXTRAL_NAMES}))


@pytest.mark.parametrize("case", ["nomask", "mask"])
def test_mixtral_hf_aux_loss(case, compare):
    """Theirs is k = 2 at perfect balance, ours 1: the weight 2 makes ours theirs."""
    ref = load("mixtral_hf.npz")
    call = {"mask": ref["attention_mask"].astype(bool)} if case == "mask" else {}
    _, losses, gradients = helpers.values_and_gradients(
        mixtral(ref, balance_weight=2.0), ref["inputs"], np.zeros_like(ref["cotangent"]), **call
    )
    compare({"loss": np.sum(losses)}, {"loss": ref[f"aux_loss_{case}"]})
    compare(
        {"inputs": gradients["inputs"], "kernel": gradients["router/kernel"]},
        {
            "inputs": ref[f"grad_aux_loss_{case}_inputs"],
            "kernel": ref[f"grad_aux_loss_{case}_router_kernel"],
        },
    )


@pytest.mark.parametrize("case", ["linear_gate", "dnn_gate"])
def test_mmoe_deepctr(case, compare):
    ref = load("mmoe_deepctr.npz", f"{case}/")
    num_experts, width, hidden = ref["expert_kernel_0"].shape
    layer = layers.MMoE(
        num_experts,
        [hidden, ref["expert_kernel_1"].shape[-1]],
        tasks=2,
        gate_units=[7] if case == "dnn_gate" else [],
    )
    layer.build((None, width))

    def named(prefix=""):
        values = {
            f"experts/{name}": ref[f"{prefix}expert_{name}"]
            for name in ("kernel_0", "bias_0", "kernel_1", "bias_1")
        }
        stacked = {"gates/kernel": "gate_kernel"}
        if case == "dnn_gate":
            stacked |= {
                "gate_hidden/kernel_0": "gate_hidden_kernel",
                "gate_hidden/bias_0": "gate_hidden_bias",
            }
        for ours, theirs in stacked.items():
            values[ours] = np.stack([ref[f"{prefix}task{t}_{theirs}"] for t in range(2)])
        return values

    helpers.set_weights(layer, named())
    (outputs, routing), _, gradients = helpers.values_and_gradients(
        layer,
        ref["inputs"],
        [ref["task0_cotangent"], ref["task1_cotangent"]],
        lambda result: result[0],
        return_routing=True,
    )
    actual, expected = {}, {}
    for t in range(2):
        actual |= {
            f"outputs{t}": outputs[t],
            f"logits{t}": routing.logits[:, t],
            f"weights{t}": routing.weights[:, t],
        }
        expected |= {
            f"outputs{t}": ref[f"task{t}_outputs"],
            f"logits{t}": ref[f"task{t}_gate_logits"],
            f"weights{t}": ref[f"task{t}_gate_weights"],
        }
    compare(actual, expected)
    compare(gradients, {"inputs": ref["grad_inputs"], **named("grad_")})
