"""One self-contained HTML file: tables and pictures of a run."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.figure import Figure as Picture

from movielens.data import ACKNOWLEDGEMENT
from movielens.figures import FIGURES
from movielens.show import (
    NAMES,
    SCORE,
    against_baselines,
    figure_rows,
    gate_sentence,
    hits_sentence,
    in_truth,
)

# Okabe and Ito's colours, told apart by readers with any colour vision.
MODEL_COLOURS = {"mmoe": "#0072B2", "shared_bottom": "#D55E00"}
TASK_COLOURS = {"engagement": "#0072B2", "liked": "#E69F00", "rating": "#009E73"}
TASK_HATCHES = {"engagement": "", "liked": "//", "rating": ".."}
_STYLE = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "figure.constrained_layout.use": True,
    "legend.frameon": False,
}


def draw_learning_curves(by_trunk: dict) -> Picture:
    """Draw each task's figure by epoch: training dashed, validation solid, a line per seed."""
    picture, panels = plt.subplots(1, len(FIGURES), figsize=(12, 3.9))
    for panel, figure in zip(panels, FIGURES, strict=True):
        for trunk, runs in by_trunk.items():
            colour = MODEL_COLOURS[trunk]
            for number, run in enumerate(runs):
                trained, validated = run.history[figure.task], run.history[f"val_{figure.task}"]
                epochs = np.arange(1, len(trained) + 1)
                label = NAMES[trunk] if number == 0 else None
                panel.plot(epochs, trained, "--", color=colour, lw=0.9, alpha=0.6)
                panel.plot(epochs, validated, color=colour, lw=1.5, alpha=0.85, label=label)
                best = run.chosen_epoch
                panel.plot(epochs[best], validated[best], "o", color=colour, ms=6)
        panel.set_title(figure.title)
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.25)
    handles, labels = panels[0].get_legend_handles_labels()
    for line, meaning in (("-", "validation"), ("--", "training")):
        handles.append(plt.Line2D([], [], color="0.35", ls=line))
        labels.append(meaning)
    handles.append(plt.Line2D([], [], color="0.35", ls="", marker="o"))
    labels.append("epoch kept")
    picture.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return picture


def draw_gates(use) -> Picture:
    """Draw a bar per expert per task: mean gate weight, and its range over the examples."""
    experts = use.mean.shape[1]
    picture, panels = plt.subplots(1, len(FIGURES), figsize=(12, 3.8), sharey=True)
    for panel, figure, mean, low, high, effective in zip(
        panels, FIGURES, use.mean, use.low, use.high, use.effective, strict=True
    ):
        place = np.arange(experts)
        panel.bar(place, mean, color=TASK_COLOURS[figure.task], width=0.7)
        panel.vlines(place, low, high, color="black", lw=1.4)
        for x, weight, top in zip(place, mean, high, strict=True):
            panel.text(
                x,
                max(top, weight) + 0.015,
                f"{weight:.0%}",
                ha="center",
                fontsize=10,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
            )
        panel.axhline(1 / experts, color="0.4", lw=1, ls=":", zorder=0.5)
        panel.set_title(f"{figure.task} gate\n({effective:.1f} effective experts)")
        panel.set_xticks(place, [f"expert {number + 1}" for number in place])
        if experts > 5:
            panel.tick_params(axis="x", rotation=60)
    panels[0].set_ylabel("gate weight")
    panels[0].set_ylim(0, min(1.0, use.high.max() + 0.1))
    return picture


def draw_expert_use(use) -> Picture:
    """Draw each expert's share of all gate weight, and of being a task's largest."""
    experts = use.mean.shape[1]
    place = np.arange(experts)
    picture, (mass, largest) = plt.subplots(1, 2, figsize=(12, 3.8))
    bottom, width = np.zeros(experts), 0.8 / len(FIGURES)
    for number, figure in enumerate(FIGURES):
        style = {
            "color": TASK_COLOURS[figure.task],
            "hatch": TASK_HATCHES[figure.task],
            "edgecolor": "white",
        }
        share = use.mean[number] / len(FIGURES)
        mass.bar(place, share, 0.7, bottom=bottom, label=figure.task, **style)
        bottom += share
        offset = (number - (len(FIGURES) - 1) / 2) * width
        largest.bar(place + offset, use.largest[number], width, label=figure.task, **style)
    mass.axhline(1 / experts, color="0.4", lw=1, ls=":")
    mass.set_title("Share of all gate weight")
    largest.set_title("Share of examples with their largest weight here")
    for panel in (mass, largest):
        panel.set_xticks(place, [f"expert {number + 1}" for number in place])
        panel.yaxis.set_major_formatter(matplotlib.ticker.PercentFormatter(1.0, decimals=0))
        if experts > 6:
            panel.tick_params(axis="x", rotation=60)
    handles, labels = mass.get_legend_handles_labels()
    picture.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    return picture


def draw_genres(use) -> Picture:
    """Draw how far each genre moves each task's gate from its mean, in percentage points."""
    shift = 100 * (use.by_genre - use.mean)
    limit = max(1.0, float(np.abs(shift).max()))
    height = 1.5 + 0.3 * len(use.genre_names)
    picture, panels = plt.subplots(1, len(FIGURES), figsize=(12, height), sharey=True)
    for number, (panel, figure) in enumerate(zip(panels, FIGURES, strict=True)):
        values = shift[:, number]
        image = panel.imshow(values, cmap="PuOr", vmin=-limit, vmax=limit, aspect="auto")
        for row, column in np.ndindex(*values.shape):
            value = values[row, column]
            colour = "white" if abs(value) > 0.65 * limit else "black"
            text = f"{value:+.0f}".replace("+0", "0").replace("-0", "0")
            panel.text(column, row, text, ha="center", va="center", fontsize=9, color=colour)
        panel.set_title(f"{figure.task} gate")
        panel.set_xticks(range(values.shape[1]), [f"{e + 1}" for e in range(values.shape[1])])
        panel.set_xlabel("expert")
        panel.spines[:].set_visible(False)
        panel.tick_params(length=0)
    panels[0].set_yticks(range(len(use.genre_names)), use.genre_names)
    bar = picture.colorbar(image, ax=panels, shrink=0.8, pad=0.01)
    bar.set_label("percentage points against the mean over all examples")
    return picture


def save_pictures(by_trunk: dict, use, folder: Path) -> dict[str, bytes]:
    """Draw all pictures, write them as PNG files, and return their bytes by name."""
    drawings: dict[str, Callable[[], Picture]] = {
        "learning_curves": lambda: draw_learning_curves(by_trunk),
        "gate_weights": lambda: draw_gates(use),
        "expert_use": lambda: draw_expert_use(use),
        "genres_and_experts": lambda: draw_genres(use),
    }
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {}
    for name, draw in drawings.items():
        with plt.rc_context(_STYLE):
            picture = draw()
            buffer = io.BytesIO()
            picture.savefig(buffer, format="png", dpi=110)
            plt.close(picture)
        pictures[name] = buffer.getvalue()
        (folder / f"{name}.png").write_bytes(pictures[name])
    return pictures


def write_report(
    path: Path, *, setting, by_trunk, results, user_id, favourites, lists, gate_use, command
) -> None:
    """Write the report, which refers to no other file."""
    pictures = save_pictures(by_trunk, gate_use, path.parent / "pictures")
    header = ["model", *(figure.title for figure in FIGURES), "parameters"]
    test = setting.test
    sections = [
        "<h1>Which movie to watch next</h1>",
        _paragraph(
            "Two answers for every user and movie: will they watch it (engagement), and will they "
            "like it (satisfaction: 4 stars or more, and the rating). A Multi-gate "
            "Mixture-of-Experts (MMoE) against a shared-bottom network of equal size, the same "
            f"examples and the same seeds ({len(by_trunk['mmoe'])})."
        ),
        '<div class="summary">' + _list(results["verdicts"]) + "</div>",
        _paragraph(against_baselines(by_trunk["mmoe"], results["baselines"])),
        "<h2>Figures on the test period</h2>",
        _table(header, figure_rows(by_trunk, results["baselines"])),
        _paragraph(
            f"Mean ± standard deviation over seeds. {int(test.watched.sum()):,} ratings of the "
            f"test period and {int((test.watched == 0).sum()):,} sampled unwatched movies, the "
            "same for every model. Every user's last 20 % of ratings test, the 10 % before them "
            "choose the epoch. No feature looks at its own moment or later; the trained weights, "
            "the split being per user, have seen training ratings that others gave later. "
            "Popularity and the bias model are what needs no neural network. The intervals are "
            "about the chance in training (seeds), not about other data."
        ),
        "<h2>Learning curves</h2>",
        _picture(
            pictures["learning_curves"],
            "Three panels with the training and validation figures of each task by epoch",
        ),
        _paragraph("One line per seed. Dropout is on while the training figures are taken."),
        "<h2>Gates: what each task takes from the experts</h2>",
        _picture(pictures["gate_weights"], "A bar per expert for the gate of each task"),
        _paragraph(
            "Mean gate weight on the test examples (MMoE, first seed); the black lines span the "
            "10th to the 90th percentile of the examples, the dotted line is an even spread. "
            "Effective experts: exp of the mean entropy. " + gate_sentence(gate_use)
        ),
        "<h2>Expert use</h2>",
        _picture(
            pictures["expert_use"],
            "Bars of each expert's share of gate weight, and of being the largest, by task",
        ),
        "<h2>Genres and experts</h2>",
        _picture(
            pictures["genres_and_experts"],
            "Heat map of genres by experts for each task: how far a genre moves the gate",
        ),
        _paragraph(
            "How a movie's genre moves the gates, in percentage points of gate weight. Genres "
            "from the most to the least frequent among the test examples."
        ),
        f"<h2>Top 10 for user {user_id}</h2>",
        _paragraph(
            f"The moment is when their test period begins. {SCORE}, the weighted product of "
            "&ldquo;Recommending What Video to Watch Next&rdquo; with all weights 1.",
            escaped=True,
        ),
        "<h3>What they liked most before</h3>",
        _table(["title", "genres", "stars"], [[t, g, f"{s:g}"] for t, g, s in favourites]),
    ]
    for trunk, top in lists.items():
        rows = [
            [
                str(place),
                movie.title,
                movie.genres,
                f"{movie.watch:.2f}",
                f"{movie.liked:.2f}",
                f"{movie.rating:.1f}",
                f"{movie.score:.2f}",
                in_truth(movie.given),
            ]
            for place, movie in enumerate(top.movies, 1)
        ]
        columns = ["", "title", "genres", "P(watch)", "P(liked)", "rating", "score", "gave later"]
        sections += [
            f"<h3>{NAMES[trunk]}</h3>",
            _table(columns, rows),
            _paragraph(hits_sentence(top)),
        ]
    sections += [
        "<h2>Again</h2>",
        f"<pre>{html.escape(command)}</pre>",
        _paragraph(f"This run took {results['seconds']} s."),
        "<h2>Data</h2>",
        _paragraph(
            "MovieLens, of GroupLens at the University of Minnesota: research use with "
            "acknowledgement, redistribution under the same terms, no commercial use without "
            f"permission; the README.txt beside the data has the full text. {ACKNOWLEDGEMENT}"
        ),
    ]
    path.write_text(_PAGE.replace("BODY", "\n".join(sections)), encoding="utf-8")


def _paragraph(text: str, escaped: bool = False) -> str:
    return f"<p>{text if escaped else html.escape(text)}</p>"


def _list(items: list[str]) -> str:
    return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in items) + "</ul>"


def _table(header: list[str], rows: list[list[str]]) -> str:
    def line(cells: list[str], tag: str) -> str:
        return (
            "<tr>"
            + "".join(
                f'<{tag} class="{"number" if _is_number(column) else "text"}">'
                f"{html.escape(cell)}</{tag}>"
                for column, cell in zip(columns, cells, strict=True)
            )
            + "</tr>"
        )

    columns = list(zip(*rows, strict=True))
    body = "".join(line(row, "td") for row in rows)
    head = line(header, "th")
    return f'<div class="wide"><table><thead>{head}</thead><tbody>{body}</tbody></table></div>'


def _is_number(column: tuple[str, ...]) -> bool:
    return all(cell[:1] in "+-0123456789" and "(" not in cell for cell in column)


def _picture(png: bytes, description: str) -> str:
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(description)}" src="data:image/png;base64,{data}">'


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Which movie to watch next: MMoE and shared bottom on MovieLens</title>
<style>
body { font: 16px/1.55 system-ui, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: #1c2430; background: #fff; max-width: 60rem; margin: 2.5rem auto; padding: 0 1.25rem; }
h1 { font-size: 2rem; line-height: 1.2; margin-bottom: .5rem; }
h2 { font-size: 1.35rem; margin: 2.5rem 0 .75rem; border-bottom: 1px solid #dde3ea;
  padding-bottom: .3rem; }
h3 { font-size: 1.05rem; margin: 1.5rem 0 .5rem; }
p { max-width: 48rem; }
img { width: 100%; height: auto; }
.summary { background: #eef5fb; border-left: 5px solid #0072B2; padding: .6rem 1rem; }
.summary ul { margin: 0; padding-left: 1.2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; }
th, td { padding: .38rem .7rem; border-bottom: 1px solid #e4e9ef; text-align: left;
  vertical-align: top; }
th { background: #f5f7fa; }
.number { text-align: right; white-space: nowrap; font-variant-numeric: tabular-nums; }
pre { background: #f5f7fa; padding: .8rem 1rem; overflow-x: auto; }
</style>
</head>
<body>
BODY
</body>
</html>
"""
