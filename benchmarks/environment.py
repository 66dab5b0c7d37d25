"""Environment of a measurement: device, versions and commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent
PEERS = ("keras-hub", "transformers", "st-moe-pytorch", "soft-moe-pytorch", "torch-rechub")
_OURS = ("keras-moe", "keras", "numpy", "jax", "jaxlib", "tensorflow", "torch")


def describe(device: tuple[str, str | None]) -> dict[str, Any]:
    """The record that is stored with every result.

    Args:
        device: what the engine says: "cpu" or "gpu", and an accelerator's name.
    """
    kind, accelerator = device
    return {
        "device": {
            "kind": kind,
            "name": accelerator or cpu_name(),
            "cores": len(os.sched_getaffinity(0)),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "load_before": round(os.getloadavg()[0], 2),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: version for name in _OURS if (version := version_of(name))},
        },
        "peers": {name: version_of(name) for name in PEERS},
        "commit": commit(),
    }


def cpu_name() -> str:
    """The processor's name, as the kernel says it."""
    try:
        match = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        match = None
    return match[1].strip() if match else platform.machine()


def version_of(package: str) -> str | None:
    """An installed package's version; None if it is not there."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict[str, Any]:
    """The commit, and whether files differ from it; empty outside of a git checkout."""
    try:
        head = _git("rev-parse", "HEAD")
        return {"hash": head, "dirty": bool(_git("status", "--porcelain", "--", "keras_moe"))}
    except (OSError, subprocess.CalledProcessError):
        return {}


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], cwd=_ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()
