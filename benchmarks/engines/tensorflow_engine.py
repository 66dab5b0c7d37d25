"""TensorFlow, as a graph of `tf.function`, with or without XLA."""

from __future__ import annotations

from typing import Any

import keras
import tensorflow as tf

from benchmarks.contender import Contender
from benchmarks.engines import Step
from benchmarks.engines.results import outputs_of
from benchmarks.measure.memory import weight_bytes
from benchmarks.rows import FORWARD

# A new function for each contender is meant; TensorFlow warns of many.
tf.get_logger().setLevel("ERROR")


class TensorFlowEngine:
    """Steps are `tf.function`s of the inputs, traced for their shape."""

    compiles = True

    def __init__(self, jit_compile: bool) -> None:
        self._jit_compile = jit_compile
        self._on_gpu = bool(tf.config.list_physical_devices("GPU"))

    def step(self, layer: Any, contender: Contender, which: str) -> Step:
        inputs = keras.ops.convert_to_tensor(contender.inputs, dtype=layer.compute_dtype)
        weights = [variable.value for variable in layer.trainable_variables]

        def forward(inputs: Any) -> Any:
            return outputs_of(layer(inputs, training=False))

        def gradient(inputs: Any) -> Any:
            with tf.GradientTape() as tape:
                tape.watch(inputs)
                outputs = outputs_of(layer(inputs, training=True))
                squares = tf.add_n([tf.reduce_mean(tf.square(output)) for output in outputs])
                loss = tf.add_n([tf.cast(squares, "float32"), *layer.losses])
            return tape.gradient(loss, [inputs, *weights])

        function = tf.function(
            forward if which == FORWARD else gradient, jit_compile=self._jit_compile
        )

        def run() -> None:
            function(inputs)
            if self._on_gpu:
                tf.test.experimental.sync_devices()

        return run

    def memory(self, layer: Any, contender: Contender, which: str) -> int | None:
        """Reads the allocator's count of a warm step."""
        device = "GPU:0" if self._on_gpu else "CPU:0"
        step = self.step(layer, contender, which)
        step()
        step()
        tf.config.experimental.reset_memory_stats(device)
        before = tf.config.experimental.get_memory_info(device)["current"]
        step()
        peak = tf.config.experimental.get_memory_info(device)["peak"]
        return peak - before - weight_bytes(layer)

    def forget(self) -> None:
        """Does nothing: every step is a new function."""

    def device(self) -> tuple[str, str | None]:
        gpus = tf.config.list_physical_devices("GPU")
        if not gpus:
            return "cpu", None
        return "gpu", tf.config.experimental.get_device_details(gpus[0]).get("device_name")


def make(compiled: bool) -> TensorFlowEngine:
    """The engine, with XLA where `compiled`."""
    return TensorFlowEngine(jit_compile=compiled)
