"""The ablations of Soft MoE: each as the paper has it, values and gradients."""

import keras
import numpy as np
import pytest

from keras_moe import layers
from keras_moe.flops import active_flops
from keras_moe.models import vit
from tests import contract, helpers
from tests.contract import Case
from tests.oracle import soft_moe

pytestmark = pytest.mark.one_backend("sums of the same operations as plain Soft MoE")

ops = keras.ops
ABLATIONS = ["soft_uniform", "uniform_soft", "uniform", "identity"]
WITH_PHI = ("soft", "soft_uniform", "uniform_soft")


def ragged(batch, length, seed):
    return np.random.default_rng(seed).random((batch, length)) < 0.6


@pytest.mark.every_backend
@pytest.mark.parametrize("mixing", ABLATIONS)
@pytest.mark.parametrize(("per_expert", "experts"), [(1, "mlp"), (2, "glu")])
@pytest.mark.parametrize("masked", [False, True])
def test_values_and_gradients(mixing, per_expert, experts, masked):
    layer = layers.SoftMoE(
        3, 5, slots_per_expert=per_expert, experts=experts, output_dim=6, mixing=mixing
    )
    layer.build((None, None, 4))
    helpers.randomize_weights(layer, 30)
    if mixing in WITH_PHI:
        layer.router.scale.assign(2.3)
    length = 3 * per_expert if mixing == "identity" else 5
    x = np.random.default_rng(31).normal(size=(4, length, 4)).astype("float32")
    cotangent = np.random.default_rng(32).normal(size=(4, length, 6)).astype("float32")
    mask = None
    if masked:
        mask = ragged(4, length, 33)
        mask[1] = False
        x[~mask] = 7.5
    call = {} if mask is None else {"mask": mask}
    (outputs, routing), losses, gradients = helpers.values_and_gradients(
        layer, x, cotangent, lambda result: result[0], return_routing=True, **call
    )
    expected, record, expected_gradients = soft_moe.run(
        x, helpers.weights_of(layer), cotangent, mask, mixing=mixing, per_expert=per_expert
    )
    assert losses == []
    helpers.assert_close(outputs, expected, "outputs")
    for name, wanted in zip(routing._fields, record, strict=True):
        helpers.assert_close(getattr(routing, name), wanted, name)
    helpers.assert_all_close(gradients, expected_gradients)


@pytest.mark.parametrize("mixing", ["soft", *ABLATIONS])
def test_every_weight_has_a_gradient(mixing):
    layer = layers.SoftMoE(3, 5, mixing=mixing)
    layer.build((None, 3, 4))
    names = {helpers.path_of(layer, weight) for weight in layer.trainable_weights}
    routing = {"router/phi", "router/scale"} if mixing in WITH_PHI else set()
    banks = {f"experts/{part}_{index}" for part in ("kernel", "bias") for index in (0, 1)}
    assert names == routing | banks
    helpers.randomize_weights(layer, 1)
    x = np.random.default_rng(2).normal(size=(2, 3, 4)).astype("float32")
    _, _, gradients = helpers.values_and_gradients(layer, x, x)
    assert all(np.abs(gradient).max() > 1e-4 for gradient in gradients.values())


def test_soft_uniform_updates_all_tokens_alike():
    """Paper, appendix A: every token of a sequence gets the same."""
    x = np.random.default_rng(0).normal(size=(2, 5, 4)).astype("float32")
    outputs = ops.convert_to_numpy(layers.SoftMoE(3, 5, mixing="soft_uniform")(x))
    np.testing.assert_allclose(outputs, np.broadcast_to(outputs[:, :1], outputs.shape), rtol=1e-6)
    assert np.abs(outputs[0] - outputs[1]).max() > 1e-3


def test_identity_is_one_expert_per_place():
    layer = layers.SoftMoE(3, 5, slots_per_expert=2, mixing="identity")
    x = np.random.default_rng(0).normal(size=(2, 6, 4)).astype("float32")
    outputs = ops.convert_to_numpy(layer(x))
    by_expert = np.swapaxes(x.reshape(2, 3, 2, 4), 0, 1).reshape(3, 4, 4)
    expected = ops.convert_to_numpy(layer.experts(ops.convert_to_tensor(by_expert)))
    expected = np.swapaxes(expected.reshape(3, 2, 2, 4), 0, 1).reshape(2, 6, 4)
    np.testing.assert_allclose(outputs, expected, rtol=1e-6, atol=1e-7)


IDENTITY = Case(
    layers.SoftMoE,
    {"num_experts": 5, "hidden_dim": 8, "mixing": "identity"},
    4,
    2,
    is_rowwise=False,  # 0 times NaN is NaN
)


@pytest.mark.parametrize(
    "check",
    [
        contract.check_config_is_json,
        contract.check_inference_is_deterministic,
        contract.check_examples_are_independent,
        contract.check_experts_start_different,
        contract.check_mixed_precision,
        contract.check_pure_precision,
        contract.check_return_routing,
        contract.check_bad_inputs,
    ],
    ids=lambda check: check.__name__,
)
def test_contract_of_identity(check):
    """What of the contract does not vary the number of tokens."""
    check(IDENTITY)


class Batches(keras.utils.PyDataset):
    """Two batches of unequal size."""

    def __len__(self):
        return 2

    def __getitem__(self, index):
        x = contract.tokens()[3 * index : 3 + index]
        return x, x.mean(axis=-1, keepdims=True)


def test_identity_in_a_model(tmp_path):
    contract.check_save_and_load(IDENTITY, tmp_path / "model.keras")
    contract.check_fit(IDENTITY, keras.backend.backend() != "torch", Batches)


def test_identity_refuses_other_lengths_where_they_are_known_late():
    inputs = keras.Input((None, 4))
    model = keras.Model(inputs, layers.SoftMoE(3, 5, mixing="identity")(inputs))
    assert model.predict(np.ones((2, 3, 4), "float32"), verbose=0).shape == (2, 3, 4)
    # In a graph of TensorFlow it is TensorFlow that refuses.
    with pytest.raises(Exception, match=r"Received: tokens=4|[Ii]ncompatible|reshape"):
        model.predict(np.ones((2, 4, 4), "float32"), verbose=0)


@pytest.mark.parametrize("mixing", ["soft", *ABLATIONS])
def test_saved_and_compiled(mixing, tmp_path):
    def saved(path):
        inputs = keras.Input((3, 4))
        outputs = layers.SoftMoE(3, 5, mixing=mixing, name="soft")(inputs)
        model = keras.Model(inputs, outputs)
        model.save(path)
        return model

    model = saved(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.get_layer("soft").mixing == mixing
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    np.testing.assert_array_equal(model.predict_on_batch(x), again.predict_on_batch(x))


@pytest.mark.parametrize("mixing", ABLATIONS)
def test_counts(mixing):
    layer = layers.SoftMoE(3, 5, mixing=mixing)
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("float32")
    mask = np.array([[1, 1, 0], [1, 1, 1]], "bool")
    _, routing = layer(x, mask=ops.convert_to_tensor(mask), training=True, return_routing=True)
    combine = ops.convert_to_numpy(routing.combine)[mask].astype("float64")
    counts = layer.running_counts()
    assert counts["decisions"] == 5
    np.testing.assert_allclose(counts["slot_importance"], combine.sum(axis=0), rtol=1e-6)
    entropy = {"identity": 0.0, "uniform": 5 * np.log(3), "soft_uniform": 5 * np.log(3)}
    if mixing in entropy:
        np.testing.assert_allclose(counts["entropy"], entropy[mixing], rtol=1e-6, atol=1e-6)
    if mixing.startswith("uniform"):
        np.testing.assert_allclose(counts["dispatch_min"], 2.0, rtol=1e-6)
        np.testing.assert_allclose(counts["dispatch_max"], 2.0, rtol=1e-6)


def test_vision_transformer_and_its_flops():
    def built(mixing):
        arguments = {"num_experts": 16, "mixing": mixing}
        return vit(
            (8, 8, 1),
            10,
            patch_size=2,
            width=32,
            depth=2,
            num_heads=2,
            feed_forward="soft_moe",
            feed_forward_arguments=arguments,
        )

    flops = {mixing: active_flops(built(mixing)) for mixing in ["soft", *ABLATIONS]}
    scores = 2 * 16 * 32 * 16
    assert flops["soft"] == flops["soft_uniform"] == flops["uniform_soft"]
    assert flops["uniform"] == flops["identity"] == flops["soft"] - scores
    with pytest.raises(ValueError, match=r"as many tokens .* = 4. Received: tokens=16"):
        vit(
            (8, 8, 1),
            10,
            patch_size=2,
            width=32,
            depth=2,
            num_heads=2,
            feed_forward="soft_moe",
            feed_forward_arguments={"num_experts": 4, "mixing": "identity"},
        )
