"""The text: what Python says about itself, or a file, as bytes; its end is held out."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np

VOCABULARY = 256  # bytes
EVALUATION_BATCH = 32
_HELD_OUT = 0.03
_NO_PROSE = {"__pycache__", "idlelib", "lib2to3", "site-packages", "dist-packages", "test", "tests"}

Arrays = tuple[np.ndarray, np.ndarray]


class DataError(Exception):
    """The text cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Text:
    """Bytes to learn from, and those of the end, which no training sees."""

    name: str
    train: np.ndarray = field(repr=False)  # (n,) uint8
    held_out: np.ndarray = field(repr=False)
    digest: str  # of all of it: another Python has other texts

    def windows(self, length: int) -> Arrays:
        """Return the held-out bytes in windows side by side, and the byte after each."""
        count = (len(self.held_out) - 1) // length // EVALUATION_BATCH * EVALUATION_BATCH
        x = self.held_out[: count * length].reshape(count, length)
        y = self.held_out[1 : count * length + 1].reshape(count, length)
        return x.astype("int32"), y.astype("int32")


def load_text(file: Path | None, length: int) -> Text:
    """Read a file, or Python's documentation where there is none.

    Args:
        file: Any file; its bytes are taken as they are.
        length: Bytes of a training window.

    Raises:
        DataError: where the file cannot be read, or is too short for windows of that length.
    """
    if file is None:
        name, content = "Python's documentation", "\n\n".join(_paragraphs()).encode()
    else:
        try:
            name, content = file.name, file.read_bytes()
        except OSError as error:
            raise DataError(f"{file} could not be read: {error.strerror}.") from error
    least = EVALUATION_BATCH * length + 1  # held out, for one batch
    held_out = max(round(_HELD_OUT * len(content)), least)
    if len(content) < 4 * held_out:
        raise DataError(
            f"the text must have at least {4 * least:,} bytes for windows of {length}. Received: "
            f"{name}, {len(content):,} bytes"
        )
    data = np.frombuffer(content, "uint8")
    digest = hashlib.sha256(content).hexdigest()[:16]
    return Text(name, train=data[:-held_out], held_out=data[-held_out:], digest=digest)


def training_batches(
    text: Text, batch_size: int, length: int, seed: int, first_step: int = 0
) -> Iterator[Arrays]:
    """Yield windows at random and the byte after each of theirs; seed and step decide which."""
    step = first_step
    while True:
        places = np.random.default_rng([seed, step]).integers(
            0, len(text.train) - length, size=batch_size
        )
        windows = text.train[places[:, None] + np.arange(length + 1)].astype("int32")
        yield windows[:, :-1], windows[:, 1:]
        step += 1


def _paragraphs() -> list[str]:
    """Return the docstrings of the standard library, then its topics; each paragraph once.

    Said twice, it could be learned by heart in the one part and asked for in the other.
    """
    once = {}
    for document in [*_docstrings(), *(topics[name] for name in sorted(topics))]:
        for paragraph in re.split(r"\n\s*\n", document):
            once.setdefault(" ".join(paragraph.split()), paragraph.strip("\n"))
    once.pop("", None)
    return list(once.values())


def _docstrings() -> Iterator[str]:
    library = Path(sysconfig.get_path("stdlib"))
    for file in sorted(library.rglob("*.py")):
        if _NO_PROSE.isdisjoint(file.relative_to(library).parts):
            for node in ast.walk(ast.parse(file.read_bytes())):
                if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                    yield ast.get_docstring(node) or ""
