"""The memory that a step takes beyond the weights and their gradients.

JAX and TensorFlow know it, and PyTorch on a GPU: the temporaries that XLA reserves, or the peak
that the allocator counts. PyTorch on a CPU does not. There a process of its own measures its
resident memory: warm, it resets the kernel's mark of its peak, runs one step, and reads the mark.
The gradients of the weights are subtracted: a mixture has more weights, which the user chose.
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from benchmarks.contender import Contender, Options
from benchmarks.engines import Step

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): resets the peak resident set size
_TIMEOUT = 600
PREFIX = "peak bytes: "


def peak_of_step(step: Step) -> int:
    """The rise of this process's resident memory while a warm step runs, in bytes."""
    _RESET.write_text(_RESET_PEAK)
    before = _kibibytes("VmRSS")
    step()
    return (_kibibytes("VmHWM") - before) * 1024


def _kibibytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise RuntimeError(f"The kernel does not report {field}: memory is not measured.")
    return int(found[1])


def weight_bytes(layer: Any) -> int:
    """The size of all trainable weights, which is that of their gradients."""
    return sum(
        math.prod(variable.shape) * (2 if "16" in variable.dtype else 4)
        for variable in layer.trainable_variables
    )


def measure_in_child(row: str, contender: Contender, which: str, options: Options) -> int:
    """Runs `benchmarks.memory_probe` for one contender and returns its bytes.

    Raises:
        RuntimeError: if the process fails.
    """
    arguments = {
        "backend": options.backend,
        "row": row,
        "contender": contender.name,
        "which": which,
        "dispatchers": list(options.dispatchers),
        "quick": options.quick,
    }
    # Large buffers then come from the kernel and go back to it, so the mark counts live ones only.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory_probe", json.dumps(arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(PREFIX)]
    if done.returncode or not lines:
        raise RuntimeError(f"The memory probe failed: {done.stderr.strip()[-500:]}")
    return int(lines[-1].removeprefix(PREFIX))
