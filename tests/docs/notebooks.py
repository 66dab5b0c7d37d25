"""Executes the notebooks of docs/notebooks, and stores their outputs: `make notebooks`.

What differs from run to run is not stored: times, and the version of Python.
"""

import os
import sys
import tempfile
from pathlib import Path

import nbclient
import nbformat

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))

# Python's warnings are outputs of a cell. What compiled code logs, as TensorFlow does while it is
# imported whatever `TF_CPP_MIN_LOG_LEVEL` is, goes to the terminal.
QUIET = ["--IPKernelApp.capture_fd_output=False", "--IPKernelApp.log_level=40"]


def execute(path: Path) -> nbformat.NotebookNode:
    """Returns the notebook as a kernel of its own leaves it; an error in a cell is raised.

    The kernel imports the library of this source tree, and reads no settings of IPython.
    """
    notebook = nbformat.read(path, as_version=4)
    client = nbclient.NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        extra_arguments=QUIET,
        resources={"metadata": {"path": str(path.parent)}},
    )
    with tempfile.TemporaryDirectory() as settings:
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"IPYTHONDIR": settings, "PYTHONPATH": os.pathsep.join(paths)}
        client.execute(env={**os.environ, **environment})
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


def warned(notebook: nbformat.NotebookNode) -> list[str]:
    """What cells wrote to stderr: warnings and lines of logs."""
    return [
        output.text
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if output.output_type == "stream" and output.name == "stderr"
    ]


def main() -> int:
    for path in NOTEBOOKS:
        notebook = execute(path)
        lines = warned(notebook)
        if lines:
            print(f"{path.name} warns, and is not stored:", *lines, sep="\n", file=sys.stderr)
            return 1
        nbformat.write(notebook, path)
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
