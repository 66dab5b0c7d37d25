"""The notebooks of docs/notebooks run, show a picture, and are stored with their outputs."""

import base64

import nbformat
import pytest

from tests.docs.notebooks import NOTEBOOKS, execute, warned
from tests.docs.test_pages import as_shown

LARGEST = 60_000  # bytes of a stored picture


def code_of(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds_of(cell):
    """What a cell puts out: its prints, its pictures."""
    return [
        (output.output_type, output.get("name"), sorted(output.get("data", {})))
        for output in cell.outputs
    ]


def printed_by(cell):
    return [output.text for output in cell.outputs if output.output_type == "stream"]


def test_each_layer_has_one():
    assert [path.stem for path in NOTEBOOKS] == ["mmoe", "moe", "soft_moe", "switch_ffn"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_is_stored_as_it_runs(path):
    stored, executed = nbformat.read(path, as_version=4), execute(path)
    assert warned(executed) == []
    pairs = list(zip(code_of(stored), code_of(executed), strict=True))
    assert any("image/png" in kind[2] for _, cell in pairs for kind in kinds_of(cell))
    for number, (old, new) in enumerate(pairs, 1):
        assert old.source == new.source
        assert (old.execution_count, kinds_of(old)) == (number, kinds_of(new)), old.source
        for before, now in zip(printed_by(old), printed_by(new), strict=True):
            assert as_shown(before) == as_shown(now), old.source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_stored_notebook_is_small_and_stays_the_same(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert 8 <= len(notebook.cells) <= 14
    assert warned(notebook) == []
    assert notebook.metadata.language_info == {"name": "python"}  # and no version
    for cell in notebook.cells:
        assert cell.metadata == {}  # and no times
        for output in cell.get("outputs", []):
            picture = output.get("data", {}).get("image/png", "")
            assert len(base64.b64decode(picture)) < LARGEST
