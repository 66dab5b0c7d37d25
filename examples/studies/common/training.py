"""Trainings that go on where they were, and the time that their steps take."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import keras

from common.console import console
from common.resume import Checkpoint, History, load_checkpoint, set_state, state_of
from keras_moe.callbacks import ExpertMonitor

TIMED_STEPS = 20


def positive(text: str) -> int:
    """Parse an option that must be 1 or more."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more. Received: {value}")
    return value


def warm_up_and_decay(peak: float, steps: int) -> keras.optimizers.schedules.LearningRateSchedule:
    """Return a rate that rises for a tenth of the steps and falls along a cosine."""
    return keras.optimizers.schedules.CosineDecay(
        0.0, steps, warmup_target=peak, warmup_steps=max(1, steps // 10)
    )


def fit_or_resume(
    trainer: keras.Model,
    file: Path,
    seed: int,
    options: argparse.Namespace,
    *,
    fresh: Callable[[], keras.Model],
    batches: Callable[[int], Iterator[Any]],
    title: str,
    validation: Mapping[str, Any],
) -> History:
    """Train a compiled model from its last checkpoint, if it has one, to the last epoch.

    Args:
        trainer: The same for all seeds: compiling takes longer than an epoch.
        file: The checkpoint.
        seed: Seed of the run.
        options: With `epochs` and `steps_per_epoch`.
        fresh: Builds the model anew, whose state a run without a checkpoint starts from.
        batches: Takes the first step's number and yields the training batches from there.
        title: What the model is called where the beginning is announced.
        validation: The arguments of `fit` that say how to validate.

    Returns:
        The history of all epochs.
    """
    history: History = {}
    if file.exists():
        history = load_checkpoint(file, trainer)
    else:
        set_state(trainer, state_of(fresh()))
    done = len(history.get("loss", ()))
    state = f", {done} of {options.epochs} epochs are done" if done else ""
    console.rule(f"{title}, seed {seed}{state}")
    if done < options.epochs:
        trainer.fit(
            batches(done * options.steps_per_epoch),
            steps_per_epoch=options.steps_per_epoch,
            initial_epoch=done,
            epochs=options.epochs,
            callbacks=[ExpertMonitor(every=10), Checkpoint(file, history, seed)],
            shuffle=False,  # the batches come in their order
            verbose=1 if sys.stdout.isatty() else 2,
            **validation,
        )
    return history


def time_steps(trainers: Mapping[str, keras.Model], batch: Any) -> dict[str, list[float]]:
    """Return the seconds of training steps, the models taking turns. This trains them further."""
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(TIMED_STEPS + 3):
        for name, trainer in trainers.items():
            began = time.perf_counter()
            trainer.train_on_batch(*batch)
            seconds[name].append(time.perf_counter() - began)
    return {name: values[3:] for name, values in seconds.items()}  # the first ones compile
