"""The HTML of the report, without scripts or other files."""

import base64
import io
import re
from collections.abc import Sequence
from html import escape
from string import Template
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_DPI = 120
_SHOWN = 70  # pixels of the page per inch: most pictures stand in pairs
_WIDE = 480  # pixels
_PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>$style</style>
</head>
<body>
<main>
<h1>$title</h1>
$body
</main>
</body>
</html>
""")
_STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #ffffff; --faint: #6a6a70;
  --line: #dcdce0; --well: #00694e; --ill: #a64900; --shade: #f5f5f7; }
@media (prefers-color-scheme: dark) { :root { --ink: #ececf0; --paper: #17171a; --faint: #a0a0a8;
  --line: #3a3a40; --well: #4fd0a8; --ill: #ffa45c; --shade: #222226; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 64rem; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 2.5rem 0 .5rem; padding-top: 1rem;
  border-top: 1px solid var(--line); overflow-wrap: anywhere; }
a { color: inherit; } p { margin: .5rem 0; } .faint { color: var(--faint); }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; }
th, td { padding: .35rem .6rem; border-bottom: 1px solid var(--line); text-align: right;
  vertical-align: top; }
th { font-weight: 600; } th:first-child, td:first-child, .words th, .words td { text-align: left; }
th[scope="row"] { overflow-wrap: anywhere; min-width: 7rem; max-width: 12rem; }
.well { color: var(--well); font-weight: 600; } .ill { color: var(--ill); font-weight: 600; }
code, .token { font-family: ui-monospace, Menlo, Consolas, monospace; font-size: .9em; }
.token { background: var(--shade); border-radius: .25rem; padding: .1rem .3rem;
  margin: 0 .35rem .25rem 0; display: inline-block;
  white-space: pre-wrap; overflow-wrap: anywhere; }
.token small { color: var(--faint); }
figure { display: inline-block; vertical-align: top; margin: 1rem 1rem .5rem 0; max-width: 100%;
  break-inside: avoid; }
figure img { display: block; max-width: 100%; height: auto; background: #ffffff;
  border-radius: .4rem; padding: .25rem; }
@media (max-width: 40rem) { .wide { overflow-x: auto; } .wide img { max-width: none; } }
figcaption { color: var(--faint); font-size: .9rem; margin-top: .3rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; font-size: .9rem; }
dt { font-weight: 600; } dd { margin: 0; color: var(--faint); }
@media print { body { font-size: 11pt; } main { max-width: none; padding: 0; }
  h2 { break-after: avoid; } table { break-inside: avoid; } }
"""


def page(title: str, parts: Sequence[str]) -> str:
    """Makes the page from parts of HTML."""
    body = "\n".join(part for part in parts if part)
    return _PAGE.substitute(title=escape(title), style=_STYLE, body=body)


def words(text: str) -> str:
    """Turns text into HTML. Text between backticks becomes code."""
    return re.sub(r"`([^`]*)`", r"<code>\1</code>", escape(text))


def number(value: float | None) -> str:
    """Formats a number for reading, with all digits in an attribute; nothing for None."""
    if value is None:
        return ""
    is_small = abs(value) < 1000 and not float(value).is_integer()
    shown = f"{value:.3g}" if is_small else f"{value:,.0f}"
    return f'<data value="{value!r}">{shown}</data>'


def table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """Makes a table. The head is text, cells are HTML, and the first cell of a row is its head."""
    top = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    lines = [
        f'<tr><th scope="row">{first}</th>' + "".join(f"<td>{cell}</td>" for cell in rest) + "</tr>"
        for first, *rest in rows
    ]
    opening = f'<table class="{kind}">' if kind else "<table>"
    return (
        f'<div class="scroll">{opening}<thead><tr>{top}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def picture(figure: "Figure", caption: str) -> str:
    """Puts a matplotlib figure into the page, with a caption."""
    file = io.BytesIO()
    figure.savefig(file, dpi=_DPI, metadata={"Software": None})
    data = base64.b64encode(file.getvalue()).decode("ascii")
    width = round(figure.get_figwidth() * _SHOWN)
    # Shrunk to a phone's width, it could not be read: it is scrolled there.
    opening = '<figure class="wide">' if width > _WIDE else "<figure>"
    return (
        f'{opening}<img src="data:image/png;base64,{data}" width="{width}" alt="{escape(caption)}">'
        f"<figcaption>{words(caption)}</figcaption></figure>"
    )
