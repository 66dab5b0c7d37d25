"""Classify images: a Vision Transformer with a mixture of experts, against a dense one.

A small ViT (Dosovitskiy et al. 2020) is trained twice on the same batches with the same recipe.
Once all its feed-forward layers are dense. Once those of the last half of its blocks are Soft MoE
(Puigcerver et al. 2023): slots that each mix all patches of an image, and an expert per slot; or a
sparse mixture, whose patches each choose their experts. The dense one's hidden layers are widened
until both compute the same per image, so what differs is where the parameters are.

    python examples/studies/images.py                      # Fashion-MNIST, Soft MoE
    python examples/studies/images.py --dataset digits     # no download
    python examples/studies/images.py --ffn switch --seeds 5
    KERAS_BACKEND=torch python examples/studies/images.py --jit-compile

Kill it at any time: the same command goes on where it was, and its numbers are those of a run that
was never killed.

What comes out, in `results/studies/images/{dataset}_{ffn}`: `dense.keras` and
`mixture.keras`, the models of the first seed; `learning_curves.png`; `experts.png`, which patches
the experts take; `figures.json`, the numbers; and `checkpoints`.
"""

from __future__ import annotations

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import argparse
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import keras
import numpy as np
from common.resume import History, ResultsError, open_results, write_whole
from common.training import fit_or_resume, positive, time_steps, warm_up_and_decay
from keras import layers
from vision import pictures, show
from vision.augmentation import RandomShiftAndFlip
from vision.data import EVALUATION_BATCH, RECIPES, DataError, Images, load_images, training_batches
from vision.routing import measure_use

from keras_moe.flops import active_flops, active_parameters
from keras_moe.models import vit

FEED_FORWARDS = ("soft_moe", "moe", "switch")
WEIGHT_DECAY = 1e-4


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="A Vision Transformer with mixtures of experts against a dense one."
    )
    parser.add_argument("--dataset", choices=RECIPES, default="fashion_mnist")
    parser.add_argument(
        "--ffn", choices=FEED_FORWARDS, default="soft_moe", help="(default: soft_moe)"
    )
    parser.add_argument("--seeds", type=positive, default=3, help="runs per model (default: 3)")
    parser.add_argument("--epochs", type=positive, default=10, help="(default: 10)")
    parser.add_argument(
        "--steps-per-epoch", type=positive, help="after each, a checkpoint (default: the dataset's)"
    )
    parser.add_argument("--batch-size", type=positive, help="(default: the dataset's)")
    parser.add_argument("--patch-size", type=positive, help="(default: the dataset's)")
    parser.add_argument("--width", type=positive, default=64, help="(default: 64)")
    parser.add_argument("--depth", type=positive, default=4, help="blocks (default: 4)")
    parser.add_argument("--heads", type=positive, default=4, help="(default: 4)")
    parser.add_argument(
        "--mlp-dim", type=positive, default=128, help="hidden units, dense or expert (default: 128)"
    )
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="(default: 0.002)")
    parser.add_argument("--dropout", type=float, default=0.0, help="(default: 0)")
    parser.add_argument(
        "--jit-compile",
        action=argparse.BooleanOptionalAction,
        # Keras's "auto" compiles nothing for a CPU on TensorFlow, where steps take twice as long.
        default=keras.backend.backend() != "torch",
        help="compile training steps, with XLA or torch.compile (default: on, except on torch)",
    )
    parser.add_argument("--out", type=Path, help="(default: by dataset and ffn, under results/)")
    parser.add_argument(
        "--overwrite", action="store_true", help="start anew in a folder that has results"
    )
    return parser.parse_args(arguments)


def complete(options: argparse.Namespace, images: Images) -> None:
    """Fill in what the dataset decides, which is digits where the one asked for is not there."""
    options.dataset, recipe = images.name, images.recipe
    options.patch_size = options.patch_size or recipe.patch_size
    options.batch_size = options.batch_size or recipe.batch_size
    options.steps_per_epoch = options.steps_per_epoch or recipe.steps_per_epoch
    options.out = options.out or Path("results/studies/images", f"{options.dataset}_{options.ffn}")
    if options.batch_size > len(images.train[0]):
        raise DataError(
            f"the batch size must be at most {len(images.train[0])}, the training images of "
            f"{images.name}. Received: {options.batch_size}"
        )


@dataclass
class Contestant:
    """One of the two models: what is saved and used, and the same with what training needs."""

    name: str  # "dense" or "mixture"
    title: str
    classifier: keras.Model  # pixels from 0 to 255 -> class probabilities
    trainer: keras.Model  # augmentation -> classifier
    flops: int
    parameters: int
    active: int


@dataclass
class Run:
    """One training, and what it came to on the test images."""

    history: History = field(repr=False)
    accuracy: float
    predictions: np.ndarray = field(repr=False)


def build_vit(images: Images, options: argparse.Namespace, **arguments: Any) -> keras.Model:
    return vit(
        images.shape,
        len(images.recipe.class_names),
        **{
            "patch_size": options.patch_size,
            "width": options.width,
            "depth": options.depth,
            "num_heads": options.heads,
            "mlp_dim": options.mlp_dim,
            "dropout": options.dropout,
            **arguments,
        },
    )


def build_mixture(images: Images, options: argparse.Namespace) -> keras.Model:
    """Build the ViT whose last half of blocks has mixtures that compute as much as a dense layer.

    Soft MoE has as many slots as there are patches; of the others, the k chosen experts have
    `mlp_dim` hidden units together.
    """
    patches = images.shape[0] * images.shape[1] // options.patch_size**2
    arguments = {
        "soft_moe": {"num_experts": 16, "slots_per_expert": max(1, round(patches / 16))},
        "moe": {"num_experts": 8, "top_k": 2, "hidden_dim": max(1, options.mlp_dim // 2)},
        "switch": {"num_experts": 8},
    }[options.ffn]
    return build_vit(images, options, feed_forward=options.ffn, feed_forward_arguments=arguments)


def build_dense(images: Images, options: argparse.Namespace) -> keras.Model:
    """Build the dense ViT, as wide as makes its FLOPs those of the mixture."""
    target = active_flops(build_mixture(images, options))
    # FLOPs are linear in the hidden units, so two widths tell them all.
    few, many = (active_flops(build_vit(images, options, mlp_dim=units)) for units in (1, 2))
    return build_vit(images, options, mlp_dim=max(1, round(1 + (target - few) / (many - few))))


def build(name: str, images: Images, options: argparse.Namespace, seed: int) -> Contestant:
    """Build and compile one of the two models; the seed decides all that is drawn at random."""
    keras.utils.set_random_seed(seed)
    network = {"dense": build_dense, "mixture": build_mixture}[name](images, options)
    classifier = keras.Sequential(
        [keras.Input(images.shape), layers.Rescaling(1 / 127.5, offset=-1.0), network],
        name="classifier",
    )
    trainer = keras.Sequential(
        [
            keras.Input(images.shape),
            RandomShiftAndFlip(images.recipe.shift, images.recipe.flips),
            classifier,
        ],
        name="trainer",
    )
    steps = options.epochs * options.steps_per_epoch
    schedule = warm_up_and_decay(options.learning_rate, steps)
    trainer.compile(
        optimizer=keras.optimizers.AdamW(schedule, weight_decay=WEIGHT_DECAY, clipnorm=1.0),
        loss="sparse_categorical_crossentropy",
        metrics=["accuracy"],
        jit_compile=options.jit_compile,
    )
    return Contestant(
        name=name,
        title="dense" if name == "dense" else show.TITLES[options.ffn],
        classifier=classifier,
        trainer=trainer,
        flops=active_flops(network),
        parameters=sum(int(np.prod(w.shape)) for w in network.trainable_weights),
        active=active_parameters(network),
    )


def train(contestant: Contestant, seed: int, images: Images, options: argparse.Namespace) -> Run:
    """Train one model, from its last checkpoint if it has one, and test it."""
    history = fit_or_resume(
        contestant.trainer,
        options.out / "checkpoints" / f"{contestant.name}-seed{seed}.npz",
        seed,
        options,
        fresh=lambda: build(contestant.name, images, options, seed).trainer,
        batches=lambda step: training_batches(images, options.batch_size, seed, step),
        title=contestant.title,
        validation={
            "validation_data": as_floats(images.validation),
            "validation_batch_size": EVALUATION_BATCH,
        },
    )
    predictions = predict(contestant.classifier, images.test[0])
    accuracy = float(np.mean(predictions.argmax(-1) == images.test[1]))
    return Run(history, accuracy, predictions)


def as_floats(part: tuple[np.ndarray, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    return part[0].astype("float32"), part[1]


def predict(classifier: keras.Model, pixels: np.ndarray) -> np.ndarray:
    return classifier.predict(pixels.astype("float32"), batch_size=EVALUATION_BATCH, verbose=0)


def save_and_reload(contestant: Contestant, run: Run, images: Images, folder: Path) -> float:
    """Save the classifier, load it, and return by how much its predictions differ at most."""
    file, draft = folder / f"{contestant.name}.keras", folder / f".{contestant.name}.draft.keras"
    contestant.classifier.save(draft)
    os.replace(draft, file)
    reloaded = predict(keras.saving.load_model(file), images.test[0])
    return float(np.abs(reloaded - run.predictions).max())


def main(arguments: list[str] | None = None) -> int:
    began = time.perf_counter()
    options = parse_arguments(arguments)
    try:
        images = load_images(options.dataset, say=show.note)
        complete(options, images)
        contestants = [build(name, images, options, seed=0) for name in ("dense", "mixture")]
        open_results(options.out, settings_of(options), options.overwrite)
    except (DataError, ResultsError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    show.introduction(images, options, contestants)

    runs: dict[str, list[Run]] = {contestant.name: [] for contestant in contestants}
    use = None
    for seed in range(options.seeds):
        for contestant in contestants:
            run = train(contestant, seed, images, options)
            runs[contestant.name].append(run)
            if seed == 0:
                difference = save_and_reload(contestant, run, images, options.out)
                show.reloaded(options.out / f"{contestant.name}.keras", difference)
                if difference > 1e-6:
                    print("error: the reloaded model does not predict the same.", file=sys.stderr)
                    return 1
            if seed == 0 and contestant.name == "mixture":
                use = measure_use(contestant.classifier, images)
                pictures.draw_use(use, contestant.classifier, images).savefig(
                    options.out / "experts.png", dpi=110
                )

    seconds = time_steps(
        {contestant.name: contestant.trainer for contestant in contestants},
        next(training_batches(images, options.batch_size, seed=0)),
    )
    results = show.as_record(contestants, runs, seconds)
    show.figures(contestants, results)
    show.experts(use)
    pictures.draw_learning_curves(contestants, runs, options).savefig(
        options.out / "learning_curves.png", dpi=110
    )
    write_whole(options.out / "figures.json", json.dumps(results, indent=2).encode())
    show.ending(options.out, time.perf_counter() - began)
    return 0


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return what a run's numbers depend on; more seeds add runs and change none."""
    settings = {**vars(options), "backend": keras.backend.backend()}
    for name in ("out", "overwrite", "seeds"):
        del settings[name]
    return settings


if __name__ == "__main__":
    sys.exit(main())
