"""What the study prints, and the numbers it writes."""

from __future__ import annotations

import keras
import numpy as np
from common.console import console
from common.seeds import mean_and_spread, verdict
from rich.markup import escape
from rich.table import Table

TITLES = {"soft_moe": "Soft MoE", "moe": "MoE, top 2 of 8", "switch": "Switch, 1 of 8"}


def note(sentence: str) -> None:
    console.print(f"[bold]Note:[/] {escape(sentence)}")


def introduction(images, options, contestants: list) -> None:
    console.rule("Vision Transformers, dense and with a mixture of experts")
    parts = (("train", images.train), ("validate", images.validation), ("test", images.test))
    sizes = ", ".join(f"{len(labels):,} to {name}" for name, (_, labels) in parts)
    height, width, channels = images.shape
    console.print(
        f"{images.name}: images of {height} x {width} x {channels} in patches of "
        f"{options.patch_size} x {options.patch_size}; {sizes}. "
        f"{options.epochs * options.steps_per_epoch:,} steps of {options.batch_size} images, "
        f"on {keras.backend.backend()}."
    )
    table = Table(title="Equal work per image")
    for column in ("model", "parameters", "active per image", "active FLOPs", "to dense"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for contestant in contestants:
        table.add_row(
            contestant.title,
            f"{contestant.parameters:,}",
            f"{contestant.active:,}",
            f"{contestant.flops:,}",
            f"{contestant.flops / contestants[0].flops:.4f}",
        )
    console.print(table)


def reloaded(file, difference: float) -> None:
    console.print(
        f"Saved and reloaded {escape(str(file))}: predictions differ by at most {difference:.1e}."
    )


def as_record(contestants: list, runs: dict, seconds: dict[str, list[float]]) -> dict:
    """Return the numbers of the whole script as plain lists and dicts."""
    return {
        "models": {
            contestant.name: {
                "title": contestant.title,
                "parameters": contestant.parameters,
                "active_parameters": contestant.active,
                "active_flops": contestant.flops,
                "test_accuracy": [run.accuracy for run in runs[contestant.name]],
                "validation_accuracy": [
                    run.history["val_accuracy"][-1] for run in runs[contestant.name]
                ],
                "seconds_per_step": float(np.median(seconds[contestant.name])),
            }
            for contestant in contestants
        },
        # Of steps that took turns, so that a busy machine slows both down.
        "step_time_ratio": float(
            np.median(np.divide(seconds["mixture"], seconds["dense"])),
        ),
    }


def figures(contestants: list, results: dict) -> None:
    console.rule("Test images")
    table = Table(title="Accuracy: mean ± standard deviation over seeds")
    columns = ("model", "accuracy", "parameters", "active FLOPs", "ms per step", "to dense")
    for column in columns:
        table.add_column(column, justify="left" if column == "model" else "right")
    for contestant in contestants:
        record = results["models"][contestant.name]
        ratio = results["step_time_ratio"] if contestant.name == "mixture" else 1.0
        table.add_row(
            contestant.title,
            mean_and_spread(record["test_accuracy"]),
            f"{contestant.parameters:,}",
            f"{contestant.flops:,}",
            f"{1000 * record['seconds_per_step']:.1f}",
            f"{ratio:.2f}",
        )
    console.print(table)
    for name, record in results["models"].items():
        by_seed = ", ".join(f"{accuracy:.4f}" for accuracy in record["test_accuracy"])
        console.print(f"{name}, seed by seed: {by_seed}")
    mixture, dense = (results["models"][name] for name in ("mixture", "dense"))
    accuracies = mixture["test_accuracy"], dense["test_accuracy"]
    console.print(verdict(mixture["title"], accuracies[0], "dense", accuracies[1]))


def experts(use) -> None:
    """Print in words what the picture of the experts shows."""
    patches = use.weights.shape[1]
    if use.is_soft:
        low, middle, high = np.percentile(use.contrast, [0, 50, 100])
        console.print(
            f"{use.layer}: the patch that a slot takes most of has {middle:.1f} times an even "
            f"share of 1/{patches} in the median slot, {low:.1f} in the least selective and "
            f"{high:.1f} in the most."
        )
    else:
        share = use.by_place.sum(0) / use.by_place.sum()
        shares = ", ".join(f"{one:.0%}" for one in share)
        console.print(f"{use.layer}: share of the weight by expert: {shares}.")


def ending(folder, seconds: float) -> None:
    console.print(f"Models, pictures and numbers: {escape(str(folder))}")
    console.print(f"Total time: {seconds:.0f} s")
