"""Other libraries' layers that are installed and run on the backend.

Only imports and calls: none of their code is here. They are imported late, when a contender is
made, so that one that does not import is reported beside the others' numbers.
"""

from __future__ import annotations

import importlib.util

import numpy as np

from benchmarks.contender import Contender, Options
from benchmarks.peers import keras_hub, soft_moe_pytorch, st_moe, torch_rechub, transformers
from benchmarks.rows import Row


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def feed_forward_peers(row: Row, inputs: np.ndarray, options: Options) -> list[Contender]:
    """The sparse layers that do the row's work: dropless ones, or ones with a capacity."""
    peers = []
    on_torch = options.keras_backend == "torch"
    if row.capacity_factor is None:
        if _is_installed("keras_hub"):
            peers += keras_hub.contenders(row, inputs)
        if on_torch and _is_installed("transformers"):
            peers += transformers.contenders(row, inputs)
    elif on_torch and _is_installed("st_moe_pytorch"):
        peers += st_moe.contenders(row, inputs)
    return peers


def soft_peers(row: Row, inputs: np.ndarray, options: Options) -> list[Contender]:
    """The Soft MoE layers."""
    if options.keras_backend == "torch" and _is_installed("soft_moe_pytorch"):
        return soft_moe_pytorch.contenders(row, inputs)
    return []


def mmoe_peers(row: Row, inputs: np.ndarray, options: Options) -> list[Contender]:
    """The multi-gate mixtures."""
    if options.keras_backend == "torch" and _is_installed("torch_rechub"):
        return torch_rechub.contenders(row, inputs)
    return []
