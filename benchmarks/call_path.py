"""Follows one forward pass of `MoE` through our code: how many files, calls, and how deep.

    KERAS_BACKEND=torch python -m benchmarks.call_path

It follows the second eager call of `MoE(8, 64, top_k=2)` on `(4, 16, 32)`. Comprehensions do not
count. "Own loop" is the backend's walk, `dispatch/backend/`, and what it calls.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import keras
import numpy as np

import keras_moe

_ROOT = str(Path(keras_moe.__file__).parent)
# `__setattr__` is Keras's doing, which sets attributes of each layer that it calls.
_NOT_CALLS = {"<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>", "<module>", "__setattr__"}


class CallPath:
    """What was called, in order: the file and the depth among our frames."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, str, int]] = []
        self._depth = 0
        self._counted: list[bool] = []

    def __call__(self, frame: FrameType, event: str, argument: Any) -> None:
        del argument
        code = frame.f_code
        if not code.co_filename.startswith(_ROOT) or code.co_name in _NOT_CALLS:
            return
        if event == "call":
            self._depth += 1
            file = code.co_filename.removeprefix(_ROOT + "/")
            self.calls.append((file, code.co_name, self._depth))
        elif event == "return":
            self._depth -= 1


def follow(is_shown: bool = False) -> dict[str, int]:
    """Runs the layer twice and follows the second call."""
    layer = keras_moe.layers.MoE(8, 64, top_k=2)
    x = keras.ops.convert_to_tensor(np.ones((4, 16, 32), "float32"))
    layer(x)
    path = CallPath()
    sys.setprofile(path)
    try:
        layer(x)
    finally:
        sys.setprofile(None)
    calls = path.calls
    walk = next((i for i, (_, name, _) in enumerate(calls) if name == "walk"), len(calls))
    bound = calls[walk][2] if walk < len(calls) else 0
    end = next((i for i in range(walk + 1, len(calls)) if calls[i][2] <= bound), len(calls))
    outside = calls[:walk] + calls[end:]
    if is_shown:
        for file, name, depth in calls:
            print("  " * depth + f"{name} ({file})")
    return {
        "files": len({file for file, _, _ in calls}),
        "calls": len(calls),
        "deepest": max(depth for _, _, depth in calls),
        "calls outside of the backend's own loop": len(outside),
        "deepest there": max(depth for _, _, depth in outside),
        "changes of file": sum(a[0] != b[0] for a, b in itertools.pairwise(calls)),
    }


if __name__ == "__main__":
    for name, number in follow(is_shown="--show" in sys.argv).items():
        print(f"{number:5d}  {name}")
