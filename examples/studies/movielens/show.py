"""What the study prints, as tables and sentences."""

from __future__ import annotations

import sys

import numpy as np
from common.seeds import mean_and_spread, paired_interval
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from movielens.data import ACKNOWLEDGEMENT, LIKED_FROM, PERIOD_NAMES
from movielens.figures import FIGURES

NAMES = {"shared_bottom": "Shared bottom", "mmoe": "MMoE"}
SCORE = "score = P(watch) * P(liked) * rating / 5"
console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def introduction(folder) -> None:
    console.rule("Which movie to watch next, with keras_moe")
    console.print(f"Data: MovieLens, {escape(str(folder))}. {ACKNOWLEDGEMENT}")


def split(setting) -> None:
    data, past = setting.data, setting.past
    table = Table(title="Split by time, per user: the last 20 % test, the 10 % before validate")
    for column in (
        "period",
        "ratings",
        "users",
        "of movies never rated in training",
        "in catalogue",
    ):
        table.add_column(column, justify="left" if column == "period" else "right")
    for period, name in enumerate(PERIOD_NAMES):
        ratings = past.ratings(period)
        cold = 1 - np.mean(past.was_rated_in_training(ratings.movie)) if len(ratings) else 0.0
        table.add_row(
            name,
            f"{len(ratings):,}",
            f"{len(np.unique(ratings.user)):,}",
            f"{cold:.1%}",
            f"{np.mean(ratings.in_catalogue):.1%}",
        )
    console.print(table)
    console.print(
        f"{data.num_users:,} users, {data.num_movies:,} movies. Catalogue at a moment: movies that "
        "somebody rated in training before it. Engagement is learned and measured on watched "
        "movies of the catalogue against sampled unwatched ones; liked (4 stars or more) and "
        "rating on all watched movies."
    )


def training_begins(trunk: str, seed: int, parameters: int, dense: int) -> None:
    console.rule(f"{NAMES[trunk]}, seed {seed}")
    console.print(f"{parameters:,} parameters, {dense:,} of them outside embedding tables")


def figures(by_trunk: dict, baselines: dict, verdicts: list[str]) -> None:
    console.rule("Test period")
    table = Table(title="Mean ± standard deviation over seeds")
    table.add_column("model")
    for figure in FIGURES:
        arrow = "higher" if figure.higher_is_better else "lower"
        table.add_column(f"{figure.title}\n({arrow} is better)", justify="right")
    table.add_column("parameters", justify="right")
    for row in figure_rows(by_trunk, baselines):
        table.add_row(*row)
    console.print(table)
    for verdict in [*verdicts, against_baselines(by_trunk["mmoe"], baselines)]:
        console.print(f"- {verdict}")


def against_baselines(runs: list, baselines: dict) -> str:
    """Return in words how the networks stand against what needs none."""
    parts = []
    for figure in FIGURES:
        ours = float(np.mean([run.figures[figure.task] for run in runs]))
        for name, values in baselines.items():
            if figure.task not in values:
                continue
            theirs = values[figure.task]
            verdict = "better" if (ours > theirs) == figure.higher_is_better else "not better"
            parts.append(f"{figure.title} {ours:.3f} to {theirs:.3f} ({name}): {verdict}")
    return f"MMoE against no network at all: {'; '.join(parts)}."


def figure_rows(by_trunk: dict, baselines: dict) -> list[list[str]]:
    """Return the rows of the table of figures: baselines, models, paired difference."""
    rows = []
    for name, values in baselines.items():
        cells = [f"{values[f.task]:.4f}" if f.task in values else "-" for f in FIGURES]
        rows.append([name, *cells, "-"])
    for trunk, runs in by_trunk.items():
        cells = [mean_and_spread([run.figures[f.task] for run in runs]) for f in FIGURES]
        rows.append([NAMES[trunk], *cells, f"{runs[0].ranker.count_params():,}"])
    cells = []
    for figure in FIGURES:
        pair = [[r.figures[figure.task] for r in by_trunk[t]] for t in ("mmoe", "shared_bottom")]
        mean, half_width = paired_interval(*pair)
        cells.append(f"{mean:+.4f}" + (f" ± {half_width:.4f}" if np.isfinite(half_width) else ""))
    rows.append(["MMoE - shared bottom, paired (95 %)", *cells, "-"])
    return rows


def recommendations(user_id: int, favourites: list, lists: dict) -> None:
    console.rule(f"Top 10 for user {user_id}, when their test period begins")
    table = Table(title="What they liked most before")
    for column in ("title", "genres", "stars"):
        table.add_column(column, justify="right" if column == "stars" else "left")
    for title, genres, stars in favourites:
        table.add_row(escape(title), genres, f"{stars:g}")
    console.print(table)
    for trunk, top in lists.items():
        table = Table(title=f"{NAMES[trunk]}: {SCORE}")
        for column in ("", "title", "genres"):
            table.add_column(column)
        for column in ("P(watch)", "P(liked)", "rating", "score", "gave later"):
            table.add_column(column, justify="right")
        for place, movie in enumerate(top.movies, 1):
            table.add_row(
                str(place),
                escape(movie.title),
                movie.genres,
                f"{movie.watch:.2f}",
                f"{movie.liked:.2f}",
                f"{movie.rating:.1f}",
                f"{movie.score:.2f}",
                in_truth(movie.given),
            )
        console.print(table)
        console.print(hits_sentence(top))


def in_truth(stars: float | None) -> str:
    """Return the rating that the user gave in the test period, ticked if they liked it."""
    if stars is None:
        return ""
    return f"{stars:g} stars" + (" ✓" if stars >= LIKED_FROM else "")


def hits_sentence(top) -> str:
    hits = sum(movie.given is not None for movie in top.movies)
    liked = sum((movie.given or 0) >= LIKED_FROM for movie in top.movies)
    by_chance = len(top.movies) * top.num_watched / max(top.num_candidates, 1)
    return (
        f"{hits} of these {len(top.movies)} were watched in the test period, {liked} of them "
        f"liked; as many drawn at random from the {top.num_candidates:,} candidates would hold "
        f"{by_chance:.1f} watched. P(watch) is against sampled unwatched movies: it ranks, "
        "it is no real-world probability."
    )


def gates(use) -> None:
    console.rule("How the tasks use the experts (MMoE, first seed, test examples)")
    table = Table(title="Mean gate weight")
    table.add_column("task")
    for expert in range(use.mean.shape[1]):
        table.add_column(f"expert {expert + 1}", justify="right")
    table.add_column("effective experts", justify="right")
    for figure, mean, effective in zip(FIGURES, use.mean, use.effective, strict=True):
        table.add_row(figure.task, *(f"{w:.1%}" for w in mean), f"{effective:.2f}")
    console.print(table)
    console.print(gate_sentence(use))


def gate_sentence(use) -> str:
    """Return in words how far the gates of the tasks differ."""
    experts = use.mean.shape[1]
    leans = ", ".join(
        f"{figure.task} leans on expert {int(mean.argmax()) + 1} ({mean.max():.0%})"
        for figure, mean in zip(FIGURES, use.mean, strict=True)
    )
    apart = {
        (first, second): np.abs(use.mean[first] - use.mean[second]).sum() / 2
        for first in range(len(FIGURES))
        for second in range(first)
    }
    (first, second), most = max(apart.items(), key=lambda pair: pair[1])
    idle = int((use.mean.max(0) < 0.25 / experts).sum())
    return (
        f"{leans[0].upper()}{leans[1:]}. The two tasks furthest apart, {FIGURES[second].task} and "
        f"{FIGURES[first].task}, place {most:.0%} of their gate weight on different experts. "
        + (f"{idle} of {experts} experts are hardly used." if idle else "No expert is idle.")
    )


def reloaded(file, difference: float) -> None:
    console.print(
        f"Saved and reloaded {escape(str(file))}: predictions differ by at most {difference:.1e}."
    )


def as_record(by_trunk: dict, baselines: dict, verdicts: list[str], use) -> dict:
    """Return the numbers of the run as plain lists and dicts."""
    return {
        "baselines": baselines,
        "models": {
            trunk: {
                "parameters": runs[0].ranker.count_params(),
                "test": {f.task: [run.figures[f.task] for run in runs] for f in FIGURES},
                "chosen_epoch": [run.chosen_epoch + 1 for run in runs],
            }
            for trunk, runs in by_trunk.items()
        },
        "verdicts": verdicts,
        "gates": {
            "mean_weight": {f.task: use.mean[i].tolist() for i, f in enumerate(FIGURES)},
            "effective_experts": {f.task: float(use.effective[i]) for i, f in enumerate(FIGURES)},
        },
    }


def ending(report, seconds: float) -> None:
    console.print(f"Report: {escape(str(report))}")
    console.print(f"Total time: {seconds:.0f} s")
