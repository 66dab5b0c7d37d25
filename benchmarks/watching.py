"""Measures the cost of running counts in a training step, and of `ExpertMonitor` in `fit`.

    python -m benchmarks.watching --backend jax

A small Transformer block with a `MoE`. Two of its kind take turns in one process, one of which does
not count, compiled as the other benchmarks compile ("gradient"). Then one model is trained by `fit`
without and with an `ExpertMonitor`, in turns. Reported is the ratio within a round, median and
quartiles over rounds. `--cpu-time` counts the processor's time, of all threads, where others use
the machine too; waiting is not in it.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from benchmarks import environment
from benchmarks.contender import Contender
from benchmarks.engines import BACKENDS, Engine
from benchmarks.measure import timing
from benchmarks.rows import GRADIENT
from benchmarks.statistics import Summary, paired_ratio

LIMIT = 1.02
COUNTS, MONITOR, MONITOR_EACH = "running counts", "ExpertMonitor()", "ExpertMonitor(every=1)"
IDLE = "a callback that does nothing"
_PLAIN = "not watched"

Clock = Callable[[], float]


class Sizes(NamedTuple):
    """Sequences of `length` tokens, model width, experts and their hidden width, batches a fit."""

    batch: int = 16
    length: int = 64
    width: int = 128
    experts: int = 8
    hidden: int = 512
    batches: int = 32


QUICK = Sizes(2, 4, 8, 2, 8, 2)


def block(sizes: Sizes) -> Any:
    """A pre-norm Transformer block, attention and `MoE`, as a model."""
    import keras
    from keras import layers

    from keras_moe.layers import MoE

    inputs = keras.Input((sizes.length, sizes.width))
    normed = layers.LayerNormalization()(inputs)
    x = inputs + layers.MultiHeadAttention(4, sizes.width // 4)(normed, normed)
    outputs = x + MoE(sizes.experts, sizes.hidden, name="moe")(layers.LayerNormalization()(x))
    return keras.Model(inputs, outputs)


def without_counts(model: Any) -> Any:
    """Returns the model with the counting of its `MoE` turned off."""
    model.get_layer("moe")._counts.add = lambda *_: None
    return model


def counting(engine: Engine, sizes: Sizes, rounds: int, clock: Clock) -> dict[str, Summary]:
    """A compiled gradient with running counts over one without."""
    shape = (sizes.batch, sizes.length, sizes.width)
    inputs = np.random.default_rng(0).normal(size=shape).astype("float32")
    models = {COUNTS: block(sizes), _PLAIN: without_counts(block(sizes))}
    steps = {
        name: engine.step(model, Contender(name, lambda: None, inputs), GRADIENT)
        for name, model in models.items()
    }
    return _ratios(steps, rounds, clock)


def monitoring(sizes: Sizes, rounds: int, clock: Clock, jit_compile: Any) -> dict[str, Summary]:
    """An epoch of `fit` with an `ExpertMonitor` over one without any callback.

    Any callback at the end of batches makes Keras wait for every batch's logs, which without one it
    leaves to another thread: hence the callback that does nothing.
    """
    import keras

    from keras_moe.callbacks import ExpertMonitor

    shape = (sizes.batch * sizes.batches, sizes.length, sizes.width)
    x = np.random.default_rng(0).normal(size=shape).astype("float32")
    model = block(sizes)
    model.compile("adam", "mse", jit_compile=jit_compile)

    def fit(*callbacks: Any) -> None:
        model.fit(x, x, batch_size=sizes.batch, verbose=0, callbacks=list(callbacks))

    class Idle(keras.callbacks.Callback):
        def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
            """Does nothing."""

    steps = {
        IDLE: lambda: fit(Idle()),
        MONITOR: lambda: fit(ExpertMonitor(alarms=False)),
        MONITOR_EACH: lambda: fit(ExpertMonitor(every=1, alarms=False)),
        _PLAIN: fit,
    }
    return _ratios(steps, rounds, clock)


def _ratios(steps: dict[str, Any], rounds: int, clock: Clock) -> dict[str, Summary]:
    durations = {name: timing.warm_up(step, clock) for name, step in steps.items()}
    samples = timing.alternate(steps, durations, rounds, seconds=3600, clock=clock)
    plain = samples.pop(_PLAIN)
    return {name: paired_ratio(seconds, plain) for name, seconds in samples.items()}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.watching",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--backend", choices=BACKENDS, default="jax", help="(default: jax)")
    parser.add_argument("--rounds", type=int, default=60, help="of the step (default: 60)")
    parser.add_argument("--fit-rounds", type=int, default=20, help="of the fit (default: 20)")
    parser.add_argument("--cpu-time", action="store_true", help="of the processor, not of the wall")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does it run?")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    parsed = parse_arguments(arguments)
    os.environ["KERAS_BACKEND"] = parsed.backend.partition("-")[0]
    from benchmarks import engines  # which imports the backend

    engine = engines.get(parsed.backend)
    sizes = QUICK if parsed.quick else Sizes()
    jit_compile = {"tensorflow-xla": True, "tensorflow": False}.get(parsed.backend, "auto")
    clock = time.process_time if parsed.cpu_time else time.perf_counter
    results = counting(engine, sizes, parsed.rounds, clock)
    results |= monitoring(sizes, parsed.fit_rounds, clock, jit_compile)
    known = environment.describe(engine.device())
    print(f"{parsed.backend}, {known['device']['name']}, load {known['device']['load_before']}")
    print(f"{sizes}, commit {known['commit'].get('hash', 'unknown')[:10]}")
    print("| what | with / without | quartiles | rounds | below 1.02 |\n|---|---|---|---|---|")
    for name, ratio in results.items():
        quartiles = f"{ratio.lower_quartile:.3f} to {ratio.upper_quartile:.3f}"
        is_met = "yes" if ratio.median < LIMIT else "no"
        print(f"| {name} | {ratio.median:.3f} | {quartiles} | {ratio.n} | {is_met} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
