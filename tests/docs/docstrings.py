"""Reads docstrings: their sections, and the arguments and defaults that they claim."""

import ast
import inspect
import re
from typing import Any, NamedTuple

_SECTION = re.compile(r"^([A-Z][a-z]+(?: [a-z]+)?):$")
_ARGUMENT = re.compile(r"^ {4}(\*{0,2}\w+): (.*)$")
_DEFAULT = re.compile(r"[Dd]efaults to `([^`]*)`")

UNSTATED = object()


class Argument(NamedTuple):
    """A documented argument: its text, and its default as a value, or UNSTATED."""

    text: str
    default: Any


def sections_of(documented: Any) -> dict[str, list[str]]:
    """Splits a docstring at its headings; what comes before the first is under ""."""
    sections: dict[str, list[str]] = {"": []}
    current = ""
    for line in inspect.getdoc(documented).splitlines():
        heading = _SECTION.match(line)
        if heading:
            current = heading.group(1)
            sections[current] = []
        else:
            sections[current].append(line)
    return sections


def documented_arguments(documented: Any) -> dict[str, Argument]:
    """The arguments in `Args`, by name, stars included."""
    texts: dict[str, str] = {}
    name = ""
    for line in sections_of(documented).get("Args", []):
        start = _ARGUMENT.match(line)
        if start:
            name = start.group(1)
            texts[name] = start.group(2)
        elif name:
            texts[name] = f"{texts[name]} {line.strip()}"
    return {name: Argument(text, _default_in(text)) for name, text in texts.items()}


def _default_in(text: str) -> Any:
    stated = _DEFAULT.findall(text)
    return ast.literal_eval(stated[-1]) if stated else UNSTATED


def forwarded_names(text: str) -> tuple[bool, set[str]]:
    """Reads a `**kwargs` line: whether it lists what is left out, and the names it lists."""
    is_exception, _, listed = text.partition("except")
    listed = listed or is_exception.partition(":")[2]
    return "except" in text, set(re.findall(r"`(\w+)`", listed))


def signature_arguments(constructor: Any) -> dict[str, inspect.Parameter]:
    """The parameters that a user passes; Keras documents `name`, and `**kwargs` are its own."""
    hidden = {"self", "cls", "name"}
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return {
        name: parameter
        for name, parameter in inspect.signature(constructor).parameters.items()
        if name not in hidden and parameter.kind not in variadic
    }
