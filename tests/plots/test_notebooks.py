"""A notebook shows the pictures, as it shows those of pyplot."""

import os
import struct
import sys
from pathlib import Path

import pytest

from keras_moe.plots._canvas import new_figure

pytestmark = pytest.mark.one_backend("pictures are of NumPy arrays")

DRAW = """
import json, pathlib
from keras_moe import plots
path = pathlib.Path("history.jsonl")
path.write_text(json.dumps({"counts": {"moe": {"load": [1, 3]}}}))
plots.load_over_time(path)
"""


def test_a_figure_is_a_picture():
    figure = new_figure(2.0, 1.0)
    assert figure._repr_png_().startswith(b"\x89PNG")
    assert (figure.get_figwidth(), figure.get_figheight()) == (2.0, 1.0)
    figure.set_dpi(40)
    width, height = struct.unpack(">II", figure._repr_png_()[16:24])
    assert (width, height) == (80, 40)


def test_a_cell_in_a_kernel_shows_its_figure_once(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason="a kernel needs the extra `dev`")
    client = pytest.importorskip("nbclient", reason="a kernel needs the extra `dev`")
    root = Path(__file__).parents[2]
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), *filter(None, sys.path)]))
    sources = (DRAW, "%matplotlib inline", "plots.load_over_time(path)")  # pyplot's way too
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    notebook = nbformat.v4.new_notebook(cells=cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    client.NotebookClient(notebook, timeout=300, resources=resources).execute()
    for cell in (notebook.cells[0], notebook.cells[2]):
        assert [set(output.data) for output in cell.outputs] == [{"image/png", "text/plain"}]
