"""Trains every layer, router and dispatcher for some steps on the device at hand.

python -m benchmarks.accelerator.train; its exit code says how many did not learn or failed. The
task has an answer that no linear layer finds: the product of two features.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from keras_moe import layers

TOKENS = 256 if os.environ.get("TINY") else 4096
WIDTH = 64
CASES: dict[str, Callable[[], keras.Layer]] = {
    "MoE": lambda: layers.MoE(8, 256, top_k=2),
    "MoE glu": lambda: layers.MoE(8, 128, top_k=2, experts="glu", use_bias=False),
    "MoE sigmoid_bias": lambda: layers.MoE(32, 64, top_k=4, router="sigmoid_bias"),
    "MoE capacity": lambda: layers.MoE(8, 256, top_k=2, capacity_factor=1.25),
    "MoE expert_choice": lambda: layers.MoE(8, 256, router="expert_choice"),
    "MoE noisy_top_k": lambda: layers.MoE(8, 256, top_k=2, router="noisy_top_k"),
    "MoE relu": lambda: layers.MoE(8, 256, top_k=2, router="relu"),
    "MoE shared": lambda: layers.MoE(8, 64, top_k=2, num_shared_experts=1),
    "MoE dense": lambda: layers.MoE(8, 64, top_k=2, dispatch="dense"),
    "MoE walk": lambda: layers.MoE(8, 64, top_k=2, dispatch="walk"),
    "MoE padded_blocks": lambda: layers.MoE(8, 64, top_k=2, dispatch="padded_blocks"),
    "MoE einsum": lambda: layers.MoE(8, 64, top_k=2, capacity_factor=1.25, dispatch="einsum"),
    "SwitchFFN": lambda: layers.SwitchFFN(8, 256),
    "SoftMoE": lambda: layers.SoftMoE(8, 256),
}
IN_FLOAT32 = ("MoE", "MoE sigmoid_bias", "MoE capacity", "SwitchFFN", "SoftMoE")


def losses_of(model: keras.Model, inputs: np.ndarray, targets: Any) -> list[float]:
    """The loss of each of three epochs."""
    model.compile(keras.optimizers.Adam(1e-2), "mse")
    history = model.fit(inputs, targets, batch_size=512, epochs=3, verbose=0).history
    return [float(loss) for loss in history["loss"]]


def mixture(make: Callable[[], keras.Layer]) -> tuple[keras.Model, str]:
    """A model with one mixture beside the identity, and the dispatcher it plans."""
    inputs = keras.Input((16, WIDTH))
    layer = make()
    outputs = keras.layers.Dense(1, dtype="float32")(layer(inputs) + inputs)
    plan = layer.dispatch_plan(8192).dispatcher if hasattr(layer, "dispatch_plan") else ""
    return keras.Model(inputs, outputs), plan


def multi_task() -> tuple[keras.Model, str]:
    """Two tasks on one MMoE."""
    inputs = keras.Input((WIDTH,))
    outputs = [
        keras.layers.Dense(1, dtype="float32")(x) for x in layers.MMoE(4, (64, 32), 2)(inputs)
    ]
    return keras.Model(inputs, keras.layers.Concatenate(dtype="float32")(outputs)), ""


def main() -> int:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((TOKENS, 16, WIDTH)).astype("float32")
    targets = inputs[..., :1] * inputs[..., 1:2]
    failures = 0
    for policy in ("mixed_bfloat16", "float32"):
        keras.config.set_dtype_policy(policy)
        cases = [(name, lambda make=make: mixture(make)) for name, make in CASES.items()]
        for name, make in [*cases, ("MMoE", multi_task)]:
            if policy == "float32" and name not in IN_FLOAT32:
                continue
            keras.utils.set_random_seed(0)
            start = time.perf_counter()
            try:
                model, plan = make()
                per_row = inputs[:, 0], np.repeat(targets[:, 0], 2, axis=1)
                losses = losses_of(model, *(per_row if name == "MMoE" else (inputs, targets)))
            except Exception as error:  # what fails is what this is for
                failures += 1
                print(f"{policy} {name}: {type(error).__name__}: {str(error)[:400]}", flush=True)
                continue
            learns = losses[-1] < losses[0] and np.isfinite(losses).all()
            failures += not learns
            print(
                f"{policy} {name}: loss {losses[0]:.4f} -> {losses[-1]:.4f}, "
                f"{time.perf_counter() - start:.1f} s {plan}{'' if learns else ' DOES NOT LEARN'}",
                flush=True,
            )
    print(f"{failures} failed" if failures else "all learn")
    return failures


if __name__ == "__main__":
    sys.exit(main())
