"""What watches layers reads what they show to everybody; imports are held by import-linter."""

import ast
from pathlib import Path

import pytest

import keras_moe

PACKAGE = Path(keras_moe.__file__).parent
FILES = sorted([*(PACKAGE / "callbacks").glob("*.py"), *(PACKAGE / "plots").glob("*.py")])


def private_reads(source):
    """`x._name` where x is not the object itself."""
    return [
        f"{ast.unparse(node)}, line {node.lineno}"
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Attribute)
        and node.attr.startswith("_")
        and not node.attr.startswith("__")
        and not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"))
    ]


def test_a_private_read_is_seen():
    assert private_reads("a = self._x\nb = layer._counts.read()") == ["layer._counts, line 2"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_no_private_state_is_read(file):
    assert private_reads(file.read_text()) == []
