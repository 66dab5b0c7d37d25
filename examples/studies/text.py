"""Predict text: language models with mixtures of experts, against a dense one.

A small decoder-only Transformer reads bytes and predicts the next one. It is trained four times on
the same batches with the same recipe: with dense feed-forward layers; with those of the Switch
Transformer (Fedus et al. 2021), one of 8 experts per byte; with the two best of 16 experts of half
the size; and with two of 16 that a bias keeps busy in place of a loss (DeepSeek-V3). The mixtures
have the same number of parameters, and the dense model's hidden layers are widened until it
computes as much per byte, so what differs is where the parameters are, and who chooses.

    python examples/studies/text.py                     # what Python says about itself
    python examples/studies/text.py --text book.txt --seeds 5
    python examples/studies/text.py --moe-every 2       # every second block is dense
    KERAS_BACKEND=torch python examples/studies/text.py

Only routing that looks at a byte alone will do: where experts choose their bytes (expert choice) or
mix them (Soft MoE), a byte's prediction depends on those after it, which training would use and
generation does not have. The Switch layers drop nothing here, for the same reason: with a capacity,
whether a byte finds room depends on the rest of the batch.

Kill it at any time: the same command goes on where it was, and its numbers are those of a run that
was never killed.

What comes out, in `results/studies/text`: a `.keras` file per model, of the first seed;
`learning_curves.png`; `experts.png`, which of Switch's experts each byte of a passage takes;
`figures.json`, the numbers; `samples.txt`, what the models write; and `checkpoints`.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import argparse
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
from common.resume import History, ResultsError, open_results, write_whole
from common.training import fit_or_resume, positive, time_steps, warm_up_and_decay
from language import pictures, show
from language.data import (
    EVALUATION_BATCH,
    VOCABULARY,
    DataError,
    Text,
    load_text,
    training_batches,
)
from language.generate import characters, generate

from keras_moe import plots, routers
from keras_moe.flops import active_flops, active_parameters
from keras_moe.models import decoder

WEIGHT_DECAY = 0.1
WRITTEN = 300  # bytes of a sample
SHOWN = 4  # windows in the picture of a passage


@dataclass(frozen=True)
class Kind:
    """How a contestant's feed-forward layers route.

    With k experts per byte there are k times as many, with a k-th of the hidden units: as many
    parameters, and as much work.
    """

    title: str
    feed_forward: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    top_k: int = 1

    def named(self, options: argparse.Namespace) -> str:
        experts = self.top_k * options.experts
        return self.title if self.feed_forward == "dense" else f"{self.title} of {experts}"


def biased_router(options: argparse.Namespace) -> dict[str, Any]:
    """Return the config of a router, from which each layer makes its own."""
    router = routers.SigmoidBiasRouter(
        2 * options.experts, top_k=2, bias_update_rate=options.bias_update_rate
    )
    return keras.saving.serialize_keras_object(router)


KINDS = {
    "dense": Kind("dense", "dense"),
    # Switch's capacity would let a byte's expert depend on the rest of the batch.
    "switch": Kind("Switch, 1", "switch", {"capacity_factor": None, "activation": "gelu"}),
    "top_2": Kind("top 2", "moe", {"top_k": 2}, top_k=2),
    "sigmoid_bias": Kind("bias, top 2", "moe", {"router": biased_router}, top_k=2),
}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Language models with mixtures of experts against a dense one."
    )
    parser.add_argument("--text", type=Path, help="a file (default: Python's documentation)")
    parser.add_argument("--seeds", type=positive, default=3, help="runs per model (default: 3)")
    parser.add_argument("--epochs", type=positive, default=8, help="(default: 8)")
    parser.add_argument(
        "--steps-per-epoch", type=positive, default=150, help="then a checkpoint (default: 150)"
    )
    parser.add_argument("--batch-size", type=positive, default=32, help="windows (default: 32)")
    parser.add_argument("--context", type=positive, default=64, help="bytes (default: 64)")
    parser.add_argument("--width", type=positive, default=64, help="(default: 64)")
    parser.add_argument("--depth", type=positive, default=2, help="blocks (default: 2)")
    parser.add_argument("--heads", type=positive, default=4, help="(default: 4)")
    parser.add_argument(
        "--mlp-dim", type=positive, default=256, help="hidden units per byte (default: 256)"
    )
    parser.add_argument(
        "--experts",
        type=positive,
        default=8,
        help="per layer, twice as many for k = 2 (default: 8)",
    )
    parser.add_argument(
        "--bias-update-rate",
        type=float,
        default=0.01,
        # Over a million times fewer tokens than DeepSeek-V3's 0.001 had.
        help="of the router with a bias (default: 0.01)",
    )
    parser.add_argument(
        "--moe-every", type=positive, default=1, help="1: all blocks, 2: every second (default: 1)"
    )
    parser.add_argument("--learning-rate", type=float, default=4e-3, help="(default: 0.004)")
    parser.add_argument("--dropout", type=float, default=0.0, help="(default: 0)")
    parser.add_argument("--prompt", default="The ", help="what samples begin with")
    parser.add_argument("--temperature", type=float, default=0.7, help="of samples (default: 0.7)")
    parser.add_argument(
        "--jit-compile",
        action=argparse.BooleanOptionalAction,
        # Keras's "auto" compiles nothing for a CPU on TensorFlow.
        default=keras.backend.backend() != "torch",
        help="compile training steps, with XLA or torch.compile (default: on, except on torch)",
    )
    parser.add_argument("--out", type=Path, default=Path("results/studies/text"))
    parser.add_argument(
        "--overwrite", action="store_true", help="start anew in a folder that has results"
    )
    return parser.parse_args(arguments)


@dataclass
class Contestant:
    """One of the models, and what it costs for a window of bytes."""

    name: str  # one of `KINDS`
    title: str
    model: keras.Model
    flops: int
    parameters: int
    active: int


@dataclass
class Run:
    """One training, and what the held-out text costs after it."""

    history: History = field(repr=False)
    bits_per_byte: float


def bits_per_byte(true: Any, logits: Any) -> Any:
    """The mean code length of a byte: 8 for one that knows nothing."""
    loss = keras.losses.sparse_categorical_crossentropy(true, logits, from_logits=True)
    return loss / math.log(2)


def build_decoder(options: argparse.Namespace, **arguments: Any) -> keras.Model:
    return decoder(
        VOCABULARY,
        **{
            "width": options.width,
            "depth": options.depth,
            "num_heads": options.heads,
            "mlp_dim": options.mlp_dim,
            "max_length": options.context,
            "moe_layers": options.moe_every,
            "dropout": options.dropout,
            **arguments,
        },
    )


def build_mixture(kind: Kind, options: argparse.Namespace) -> keras.Model:
    """Build a model whose chosen experts have `mlp_dim` hidden units together."""
    arguments = {
        "num_experts": kind.top_k * options.experts,
        "hidden_dim": max(1, options.mlp_dim // kind.top_k),
        **{
            name: value(options) if callable(value) else value
            for name, value in kind.arguments.items()
        },
    }
    return build_decoder(options, feed_forward=kind.feed_forward, feed_forward_arguments=arguments)


def flops_of(model: keras.Model, options: argparse.Namespace) -> int:
    return active_flops(model, input_shape=(options.context,))


def build_dense(options: argparse.Namespace) -> keras.Model:
    """Build the dense model, as wide as makes its FLOPs those of the mixtures."""
    target = flops_of(build_mixture(KINDS["top_2"], options), options)
    # FLOPs are linear in the hidden units, so two widths tell them all.
    few, many = (flops_of(build_decoder(options, mlp_dim=units), options) for units in (1, 2))
    return build_decoder(options, mlp_dim=max(1, round(1 + (target - few) / (many - few))))


def build(name: str, options: argparse.Namespace, seed: int) -> Contestant:
    """Build and compile one of the models; the seed decides all that is drawn at random."""
    keras.utils.set_random_seed(seed)
    kind = KINDS[name]
    model = build_dense(options) if name == "dense" else build_mixture(kind, options)
    steps = options.epochs * options.steps_per_epoch
    model.compile(
        optimizer=keras.optimizers.AdamW(
            warm_up_and_decay(options.learning_rate, steps),
            weight_decay=WEIGHT_DECAY,
            beta_2=0.95,
            clipnorm=1.0,
        ),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=[bits_per_byte],
        jit_compile=options.jit_compile,
    )
    return Contestant(
        name=name,
        title=kind.named(options),
        model=model,
        flops=flops_of(model, options),
        parameters=sum(int(np.prod(w.shape)) for w in model.trainable_weights),
        active=active_parameters(model),
    )


def train(contestant: Contestant, seed: int, text: Text, options: argparse.Namespace) -> Run:
    """Train one model, from its last checkpoint if it has one."""
    history = fit_or_resume(
        contestant.model,
        options.out / "checkpoints" / f"{contestant.name}-seed{seed}.npz",
        seed,
        options,
        fresh=lambda: build(contestant.name, options, seed).model,
        batches=lambda step: training_batches(
            text, options.batch_size, options.context, seed, step
        ),
        title=contestant.title,
        validation={
            "validation_data": text.windows(options.context),
            "validation_batch_size": EVALUATION_BATCH,
        },
    )
    return Run(history, history["val_bits_per_byte"][-1])


def save_and_reload(contestant: Contestant, text: Text, options: argparse.Namespace) -> float:
    """Save the model, load it, and return by how much its predictions differ at most."""
    file = options.out / f"{contestant.name}.keras"
    draft = options.out / f".{contestant.name}.draft.keras"
    contestant.model.save(draft)
    os.replace(draft, file)
    window = text.windows(options.context)[0][:EVALUATION_BATCH]
    first, second = (
        model.predict(window, batch_size=EVALUATION_BATCH, verbose=0)
        for model in (contestant.model, keras.saving.load_model(file, compile=False))
    )
    return float(np.abs(first - second).max())


def draw_experts(contestant: Contestant, text: Text, options: argparse.Namespace) -> Any:
    """Draw which expert of the last mixture each byte takes, where the held-out text begins."""
    windows = text.windows(options.context)[0][:SHOWN]
    last = [part for part in contestant.model.layers if hasattr(part, "running_counts")][-1]
    return plots.token_experts(
        contestant.model, windows, characters(windows), layer=last.name, line_width=64
    )


def main(arguments: list[str] | None = None) -> int:
    began = time.perf_counter()
    options = parse_arguments(arguments)
    try:
        text = load_text(options.text, options.context)
        contestants = [build(name, options, seed=0) for name in KINDS]
        open_results(options.out, settings_of(options, text), options.overwrite)
    except (DataError, ResultsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show.introduction(text, options, contestants)

    runs: dict[str, list[Run]] = {contestant.name: [] for contestant in contestants}
    samples = {}
    for seed in range(options.seeds):
        for contestant in contestants:
            runs[contestant.name].append(train(contestant, seed, text, options))
            if seed:
                continue
            difference = save_and_reload(contestant, text, options)
            show.reloaded(options.out / f"{contestant.name}.keras", difference)
            if difference > 1e-5:
                print("error: the reloaded model does not predict the same.", file=sys.stderr)
                return 1
            samples[contestant.title] = sample(contestant, options)
            if contestant.name == "switch":
                picture = draw_experts(contestant, text, options)
                picture.savefig(options.out / "experts.png", dpi=110)

    seconds = time_steps(
        {contestant.name: contestant.model for contestant in contestants},
        next(training_batches(text, options.batch_size, options.context, seed=0)),
    )
    results = show.as_record(contestants, runs, seconds)
    show.figures(results, text)
    show.samples(samples, options.prompt)
    pictures.draw_learning_curves(contestants, runs, options).savefig(
        options.out / "learning_curves.png", dpi=110
    )
    write_whole(options.out / "figures.json", json.dumps(results, indent=2).encode())
    write_whole(options.out / "samples.txt", show.as_text(samples, options.prompt).encode())
    show.ending(options.out, time.perf_counter() - began)
    return 0


def sample(contestant: Contestant, options: argparse.Namespace) -> str:
    written = generate(
        contestant.model,
        options.prompt.encode(),
        WRITTEN,
        options.context,
        options.temperature,
    )
    return written.decode(errors="replace")


def settings_of(options: argparse.Namespace, text: Text) -> dict[str, Any]:
    """Return what a run's numbers depend on; more seeds add runs and change none."""
    settings = {**vars(options), "backend": keras.backend.backend(), "text": text.digest}
    for name in ("out", "overwrite", "seeds", "prompt", "temperature"):
        del settings[name]
    return settings


if __name__ == "__main__":
    sys.exit(main())
