"""Fits the docstrings, which are written for `help()`, to Markdown.

Equation lines and doctests would run together as prose: they become code blocks.
"""

import re
from typing import Any

import griffe

# `y[n] = ...`, `expert_e(x) = ...`: an indexed or called name, then an equals sign.
_EQUATION = re.compile(r"^\w+(\[[^\]]*\]|\(\w+\))\s*= ")


class PlainDocstrings(griffe.Extension):
    """Fences equations and doctests."""

    def on_instance(self, *, obj: griffe.Object | griffe.Alias, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = fenced(obj.docstring.value)


def fenced(docstring: str) -> str:
    """Returns a docstring with its equations and doctests in code blocks."""
    lines: list[str] = []
    language = None
    for line in docstring.splitlines():
        wanted = _language(line, language)
        if wanted != language:
            lines += ["```"] * bool(language) + [f"\n```{wanted}"] * bool(wanted)
            language = wanted
        lines.append("**Example:**" if line == "Example:" else line)
    return "\n".join(lines + ["```"] * bool(language))


def _language(line: str, current: str | None) -> str | None:
    if line.startswith(">>> ") or (current == "pycon" and line):
        return "pycon"
    return "text" if _EQUATION.match(line) else None
