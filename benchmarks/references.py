"""References for our layers: plain layers, as a user would write them without this library."""

from __future__ import annotations

from typing import Any

import keras

from benchmarks.rows import Sizes
from keras_moe.core.types import Shape, Tensor

ACTIVATION = "gelu"  # the default of keras_moe's layers
GLU_ACTIVATION = "silu"  # of Mixtral and Qwen3


class DenseFFN(keras.layers.Layer):
    """Two dense layers, the feed-forward part of a Transformer."""

    def __init__(self, hidden: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden = hidden

    def build(self, input_shape: Shape) -> None:
        width = input_shape[-1]
        self.up = keras.layers.Dense(self.hidden, ACTIVATION)
        self.down = keras.layers.Dense(width)
        self.up.build((None, width))
        self.down.build((None, self.hidden))

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        del training
        return self.down(self.up(inputs))


def dense_ffn(width: int, hidden: int) -> keras.Layer:
    """`DenseFFN`, built. With hidden width k h it does the work of k experts, without routing."""
    layer = DenseFFN(hidden)
    layer.build((None, width))
    return layer


class GatedFFN(keras.layers.Layer):
    """The gated dense layer of Mixtral and Qwen3: down(silu(gate(x)) * up(x)), without biases."""

    def __init__(self, hidden: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.hidden = hidden

    def build(self, input_shape: Shape) -> None:
        width = input_shape[-1]
        self.gate = keras.layers.Dense(self.hidden, GLU_ACTIVATION, use_bias=False)
        self.up = keras.layers.Dense(self.hidden, use_bias=False)
        self.down = keras.layers.Dense(width, use_bias=False)
        self.gate.build((None, width))
        self.up.build((None, width))
        self.down.build((None, self.hidden))

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        del training
        return self.down(self.gate(inputs) * self.up(inputs))


def gated_ffn(width: int, hidden: int) -> keras.Layer:
    """`GatedFFN`, built."""
    layer = GatedFFN(hidden)
    layer.build((None, width))
    return layer


class BatchedFFN(keras.layers.Layer):
    """Both products of all experts on equal shares of the assignments, and the sum over choices."""

    def __init__(self, sizes: Sizes, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.sizes = sizes

    def build(self, input_shape: Shape) -> None:
        _, width, hidden, experts, _ = self.sizes
        self.up = self.add_weight(shape=(experts, width, hidden), name="up")
        self.down = self.add_weight(shape=(experts, hidden, width), name="down")

    def call(self, inputs: Tensor, training: bool | None = None) -> Tensor:
        del training
        hidden = keras.activations.get(ACTIVATION)(keras.ops.matmul(inputs, self.up))
        outputs = keras.ops.matmul(hidden, self.down)
        return keras.ops.sum(
            keras.ops.reshape(outputs, (self.sizes.top_k, -1, self.sizes.width)), axis=0
        )


def batched_ffn(sizes: Sizes) -> keras.Layer:
    """`BatchedFFN`, built. It takes `(E, k T / E, d)`."""
    layer = BatchedFFN(sizes)
    layer.build((sizes.experts, None, sizes.width))
    return layer


class LoopMMoE(keras.layers.Layer):
    """MMoE as it is usually written: a stack of Dense per expert, a Dense gate per task."""

    def __init__(self, num_experts: int, units: tuple[int, ...], tasks: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.experts = [
            keras.Sequential([keras.layers.Dense(width, activation="relu") for width in units])
            for _ in range(num_experts)
        ]
        self.gates = [
            keras.layers.Dense(num_experts, activation="softmax", use_bias=False)
            for _ in range(tasks)
        ]

    def build(self, input_shape: Shape) -> None:
        for layer in [*self.experts, *self.gates]:
            layer.build((None, input_shape[-1]))

    def call(self, inputs: Tensor, training: bool | None = None) -> list[Tensor]:
        del training
        experts = keras.ops.stack([expert(inputs) for expert in self.experts], axis=1)
        weights = [keras.ops.expand_dims(gate(inputs), -1) for gate in self.gates]
        return [keras.ops.sum(weight * experts, axis=1) for weight in weights]


def loop_mmoe(width: int, num_experts: int, units: tuple[int, ...], tasks: int) -> keras.Layer:
    """`LoopMMoE`, built."""
    layer = LoopMMoE(num_experts, units, tasks)
    layer.build((None, width))
    return layer


def mmoe_chain(width: int, num_experts: int, units: tuple[int, int], tasks: int) -> keras.Layer:
    """A chain of matmuls with exactly the FLOPs of MMoE, and nothing between but the activation.

    d -> E u0 is every expert's first layer; u0 -> u1 on each of the E parts has the FLOPs of their
    second layers; and E u1 -> T (d + u1) / u1 those of the T gates and of the T weighted sums.
    """
    first, last = units
    layer = keras.Sequential(
        [
            keras.layers.Dense(num_experts * first, activation="relu"),
            keras.layers.Reshape((num_experts, first)),
            keras.layers.Dense(last, activation="relu"),
            keras.layers.Reshape((num_experts * last,)),
            keras.layers.Dense(max(round(tasks * (width + last) / last), 1), use_bias=False),
        ]
    )
    layer.build((None, width))
    return layer
