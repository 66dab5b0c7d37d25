"""What the study prints, and the numbers it writes."""

from __future__ import annotations

import platform

import keras
import numpy as np
from common.console import console
from common.seeds import mean_and_spread, verdict
from rich.markup import escape
from rich.table import Table

from language.baselines import bits_of_pairs, bits_of_xz


def introduction(text, options, contestants: list) -> None:
    console.rule("Language models, dense and with mixtures of experts")
    seen = options.epochs * options.steps_per_epoch * options.batch_size * options.context
    console.print(
        f"{escape(text.name)}: {len(text.train):,} bytes to train, {len(text.held_out):,} held out "
        f"(Python {platform.python_version()}, text {text.digest}). "
        f"{options.epochs * options.steps_per_epoch:,} steps of {options.batch_size} windows of "
        f"{options.context} bytes, {seen / len(text.train):.1f} passes, on "
        f"{keras.backend.backend()}."
    )
    table = Table(title="Equal work per byte")
    for column in ("model", "parameters", "active", "active FLOPs per byte", "to dense"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for contestant in contestants:
        table.add_row(
            contestant.title,
            f"{contestant.parameters:,}",
            f"{contestant.active:,}",
            f"{contestant.flops / options.context:,.0f}",
            f"{contestant.flops / contestants[0].flops:.4f}",
        )
    console.print(table)


def reloaded(file, difference: float) -> None:
    console.print(
        f"Saved and reloaded {escape(str(file))}: logits differ by at most {difference:.1e}."
    )


def as_record(contestants: list, runs: dict, seconds: dict[str, list[float]]) -> dict:
    """Return the numbers of the whole script, by model, as plain lists and dicts."""
    dense = seconds[contestants[0].name]
    return {
        contestant.name: {
            "title": contestant.title,
            "parameters": contestant.parameters,
            "active_parameters": contestant.active,
            "active_flops": contestant.flops,
            "bits_per_byte": [run.bits_per_byte for run in runs[contestant.name]],
            "curves": [run.history["val_bits_per_byte"] for run in runs[contestant.name]],
            "training_bits_per_byte": [
                run.history["bits_per_byte"][-1] for run in runs[contestant.name]
            ],
            "seconds_per_step": float(np.median(seconds[contestant.name])),
            # Of steps that took turns, so that a busy machine slows both down.
            "step_time_ratio": float(np.median(np.divide(seconds[contestant.name], dense))),
        }
        for contestant in contestants
    }


def figures(results: dict, text) -> None:
    console.rule("Held-out text")
    console.print(
        f"For scale: a table of byte pairs costs {bits_of_pairs(text):.4f} bits per byte, xz after "
        f"all of the training text {bits_of_xz(text):.4f}."
    )
    table = Table(title="Bits per byte (lower is better): mean ± standard deviation over seeds")
    for column in (
        "model",
        "bits per byte",
        "in training",
        "parameters",
        "ms per step",
        "to dense",
    ):
        table.add_column(column, justify="left" if column == "model" else "right")
    for record in results.values():
        table.add_row(
            record["title"],
            mean_and_spread(record["bits_per_byte"]),
            f"{np.mean(record['training_bits_per_byte']):.4f}",
            f"{record['parameters']:,}",
            f"{1000 * record['seconds_per_step']:.1f}",
            f"{record['step_time_ratio']:.2f}",
        )
    console.print(table)
    for record in results.values():
        by_seed = ", ".join(f"{bits:.4f}" for bits in record["bits_per_byte"])
        console.print(f"{record['title']}, seed by seed: {by_seed}")
    dense, *mixtures = results.values()
    for mixture in mixtures:
        console.print(
            verdict(
                mixture["title"],
                mixture["bits_per_byte"],
                dense["title"],
                dense["bits_per_byte"],
                higher_is_better=False,
            )
        )


def samples(by_title: dict[str, str], prompt: str) -> None:
    console.rule("What they write")
    console.print(escape(as_text(by_title, prompt)))


def as_text(by_title: dict[str, str], prompt: str) -> str:
    """Return the samples under their models' titles."""
    return "\n\n".join(f"[{title}]\n{prompt}{text}" for title, text in by_title.items()) + "\n"


def ending(folder, seconds: float) -> None:
    console.print(f"Models, pictures and numbers: {escape(str(folder))}")
    console.print(f"Total time: {seconds:.0f} s")
