"""On a GPU, PyTorch's program runs ahead of the device: no layer waits for a number that is on it.

Fake tensors have shapes and no values: whatever reads a value, as `.item()` or `.tolist()` does and
as results whose size follows the values do, is an error.
"""

import keras
import pytest

from keras_moe import layers
from keras_moe.dispatch import native

torch = pytest.importorskip("torch")

pytestmark = pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="of PyTorch's eager mode"
)

WIDTH = 32
LAYERS = {
    "default": {},
    "gated, shared": {"experts": "glu", "num_shared_experts": 1},
    "sigmoid_bias": {"router": "sigmoid_bias"},
    "relu": {"router": "relu"},
    "sinkhorn": {"router": "sinkhorn"},
    "by example": {"routing_level": "example"},
    "capacity": {"capacity_factor": 1.25, "dispatch": "slots"},
    "expert_choice": {"router": "expert_choice", "dispatch": "auto"},
}


def make(name):
    # As "auto" takes it on a GPU, and in a dtype that its fake kernel knows.
    return layers.MoE(8, 64, dtype="bfloat16", **{"dispatch": "grouped", **LAYERS[name]})


def fake(*shape):
    return torch.empty(shape, dtype=torch.bfloat16, requires_grad=True)


def ran(layer, *shape):
    """The gradient by the inputs of a call in training, all of it on fake tensors."""
    with torch._subclasses.fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
        inputs = fake(*shape)
        outputs = layer(inputs, training=True)
        outputs = sum(outputs) if isinstance(outputs, list) else outputs
        (outputs.float().sum() + sum(layer.losses)).backward()
        return inputs.grad


@pytest.mark.parametrize("name", LAYERS)
def test_a_sparse_layer_reads_no_value(name):
    layer = make(name)
    layer.build((None, None, WIDTH))
    native.check("bfloat16")  # once in a process, and not in a call
    assert ran(layer, 4, 16, WIDTH).shape == (4, 16, WIDTH)


@pytest.mark.parametrize(
    "make",
    [lambda: layers.MMoE(4, [16], tasks=2, dtype="bfloat16"), lambda: layers.SoftMoE(4, 16)],
)
def test_the_others_read_none(make):
    layer = make()
    shape = (4, WIDTH) if isinstance(layer, layers.MMoE) else (4, 8, WIDTH)
    layer.build((None, *shape[1:]))
    assert ran(layer, *shape).shape == shape


def test_a_reading_is_seen():
    layer = layers.MoE(8, 64, dispatch="walk", dtype="bfloat16")
    layer.build((None, WIDTH))
    with pytest.raises(Exception, match=r"_local_scalar_dense|tolist|data|item"):
        ran(layer, 64, WIDTH)
