"""What the study prints: progress, tables and sentences."""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from tuning.compare import Run, difference, mean_and_spread, verdict
from tuning.pareto import pareto_front
from tuning.search import Row, Search, of_the_model

DEFAULT = "default"  # in place of a trial's number
console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


@contextlib.contextmanager
def progress_bar(title: str, total: int, epochs: int) -> Iterator[Callable[..., None]]:
    """Show a bar of trainings, and print a line for each trial that ended."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        done = 0

        def update(*, epoch: int, trial: int | None = None, row: Row | None = None) -> None:
            nonlocal done
            done = done if trial is None else trial
            if row is not None:
                console.print(f"  {title} {row.number} of {total}: {escape(summary(row))}")
            current = f"{title} {min(done + 1, total)} of {total}, epoch {epoch} of {epochs}"
            bar.update(task, completed=min(done + epoch / epochs, total), description=current)

        yield update


def summary(row: Row) -> str:
    """Return a trial in a line."""
    if not row.is_complete:
        return f"{row.status} after {row.seconds:.1f} s. {row.message}"
    return f"{row.metric:.4f} at {cost(row.flops)}FLOPs in {row.seconds:.1f} s"


def trials(search: Search, rows: list[Row]) -> None:
    """Print a row per trial; the front of metric and FLOPs has a star, the best is bold."""
    direction = "higher" if search.metric.higher_is_better else "lower"
    table = Table(title=f"{search.title}: trials (* on the Pareto front; {direction} is better)")
    for column in ("", "hyperparameters", search.metric.title.replace(", ", ",\n")):
        table.add_column(column, justify="left" if column == "hyperparameters" else "right")
    for column in ("active\nFLOPs", "active\nparameters", "seconds"):
        table.add_column(column, justify="right")
    table.add_column("status")
    front, best = front_of(search, rows), best_of(search, rows)
    for index, row in enumerate(rows):
        table.add_row(
            row.number + (" *" if index in front else ""),
            escape(hyperparameters(row.values)),
            number(row.metric, ".4f"),
            cost(row.flops),
            cost(row.parameters),
            number(row.seconds, ".1f"),
            row.status,
            style="bold" if row is best else None,
        )
    console.print(table)
    for row in rows:
        if row.message:
            console.print(f"- trial {row.number}, {row.status}: {escape(row.message)}")


def front_of(search: Search, rows: list[Row]) -> list[int]:
    """Return the indices of the rows that no other dominates, from cheap to dear."""
    costs, metrics = [row.flops for row in rows], [row.metric for row in rows]
    return pareto_front(costs, metrics, search.metric.higher_is_better)


def best_of(search: Search, rows: list[Row]) -> Row | None:
    """Return the trial with the best metric, the cheapest of equals; None where all failed."""
    rows = [row for row in rows if row.number != DEFAULT]
    front = front_of(search, rows)
    if not front:
        return None
    most = rows[front[-1]].metric
    return next(rows[index] for index in front if rows[index].metric == most)


def comparison(search: Search, best: list[Run], default: list[Run]) -> None:
    """Print both on the test split, and whether the difference is more than chance."""
    table = Table(title=f"{search.title}: retrained, test split, mean ± deviation over seeds")
    table.add_column("")
    for figure in search.figures:
        direction = "higher" if figure.higher_is_better else "lower"
        table.add_column(f"{figure.title}\n({direction} is better)", justify="right")
    for column in ("active\nFLOPs", "active\nparameters"):
        table.add_column(column, justify="right")
    for name, runs in (("default", default), ("best of the search", best)):
        cells = [mean_and_spread(runs, figure) for figure in search.figures]
        table.add_row(name, *cells, cost(runs[0].flops), cost(runs[0].parameters))
    cells = []
    for figure in search.figures:
        mean, half_width = difference(figure, best, default)
        cells.append(f"{mean:+.4f}" + (f" ± {half_width:.4f}" if math.isfinite(half_width) else ""))
    table.add_row("best - default, paired (95 %)", *cells, "", "")
    console.print(table)
    for figure in search.figures:
        console.print(f"- {verdict(figure, best, default)}")


def hyperparameters(values: dict[str, Any]) -> str:
    """Return hyperparameters in short, such as "moe 8 num_experts, 0.003 learning_rate"."""
    short = {name.rpartition("/")[2]: value for name, value in of_the_model(values).items()}
    if "tuner/epochs" in values:
        short["epochs"] = values["tuner/epochs"]
    kind = [str(short.pop("feed_forward"))] if "feed_forward" in short else []
    return ", ".join([*kind, *(f"{name}={value}" for name, value in short.items())])


def number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def cost(value: float) -> str:
    """Return a count with three digits: 905856 is "906 k"."""
    if not math.isfinite(value):
        return "-"
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value:.0f} "


def as_record(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the numbers of the searches as plain lists and dicts."""
    return {
        each["search"].name: {
            "trials": [
                {name: _plain(value) for name, value in asdict(row).items()} for row in each["rows"]
            ],
            "pareto_front": [
                each["rows"][index].number for index in front_of(each["search"], each["rows"])
            ],
            "test": {name: [asdict(run) for run in runs] for name, runs in each["runs"].items()},
            "verdicts": [
                verdict(figure, each["runs"]["best"], each["runs"]["default"])
                for figure in each["search"].figures
                if each["runs"]["best"]
            ],
        }
        for each in found
    }


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def ending(picture: Path, seconds: float) -> None:
    console.print(f"Picture: {escape(str(picture))}")
    console.print(f"Total time: {seconds:.0f} s")
