"""What the searches found, in one picture."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from common.style import STYLE
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from tuning.search import Row, Search
from tuning.show import DEFAULT, best_of, cost, front_of

# Okabe and Ito's colours, told apart by readers with any colour vision; shapes tell them apart too.
_LOOKS = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#56B4E9", "v"))
_STYLE = {**STYLE, "axes.titlesize": 12, "axes.titleweight": "bold"}


def draw(found: list[tuple[Search, list[Row], str]], file: Path) -> None:
    """Draw the metric against the active FLOPs, a panel per search.

    Args:
        found: Searches, their rows (the default among them), and the hyperparameter that colours
            the points.
        file: The PNG.
    """
    with plt.rc_context(_STYLE):
        picture, panels = plt.subplots(
            1, len(found), figsize=(6.4 * len(found), 4.8), squeeze=False
        )
        for panel, (search, rows, coloured_by) in zip(panels[0], found, strict=True):
            _draw_panel(panel, search, rows, coloured_by)
        picture.savefig(file, dpi=130)
        plt.close(picture)


def _draw_panel(panel: Axes, search: Search, rows: list[Row], coloured_by: str) -> None:
    front = [rows[index] for index in front_of(search, rows)]
    rows = [row for row in rows if row.is_complete]
    if front:
        right = max(row.flops for row in rows)
        panel.step(
            [*(row.flops for row in front), right],
            [*(row.metric for row in front), front[-1].metric],
            where="post",
            color="0.6",
            zorder=1,
            label="Pareto front",
        )
    groups = sorted({str(row.values.get(coloured_by)) for row in rows}, key=lambda k: (len(k), k))
    for group, (colour, marker) in zip(groups, _LOOKS * len(groups), strict=False):
        members = [row for row in rows if str(row.values.get(coloured_by)) == group]
        panel.scatter(
            [row.flops for row in members],
            [row.metric for row in members],
            c=colour,
            marker=marker,
            s=45,
            zorder=2,
            label=f"{group} experts" if group.isdigit() else group.replace("_", " "),
        )
    best = best_of(search, rows)
    for row in rows:
        is_default, is_best = row.number == DEFAULT, row is best
        words = [word for word, holds in (("default", is_default), ("best", is_best)) if holds]
        if not words and row not in front:
            continue
        text = " = ".join(words) if is_default or not words else f"{words[0]}, trial {row.number}"
        panel.annotate(
            text or row.number,
            (row.flops, row.metric),
            xytext=(6, -14 if is_default and not is_best else 7),
            textcoords="offset points",
            fontweight="bold" if words else "normal",
            fontsize=10,
        )
        if words:
            panel.scatter(
                row.flops,
                row.metric,
                s=150,
                facecolors="none",
                edgecolors="black",
                lw=1.5,
                zorder=3,
            )
    panel.set(title=search.title, xscale="log")
    panel.set_xlabel("active FLOPs per example, forward")
    panel.set_ylabel(search.metric.title)
    if not search.metric.higher_is_better:
        panel.set_ylabel(f"{search.metric.title}\n(turned: up is better)")
        panel.invert_yaxis()
    panel.margins(x=0.16, y=0.12)
    panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: cost(value).strip()))
    panel.xaxis.set_minor_formatter(NullFormatter())
    panel.grid(alpha=0.25)
    panel.legend(fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3)
