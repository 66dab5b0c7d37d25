"""Preparation of other libraries' torch modules for timing."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

_STANDARD_DEVIATION = 0.02


def prepare(module: Any, router_weight: Any = None) -> Any:
    """Moves a module to the device and dtype in use, with random weights and a known router.

    Args:
        module: a torch module; its weights may be uninitialised memory.
        router_weight: its router's `(E, d)` parameter.
    """
    import torch

    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=_STANDARD_DEVIATION)
        if router_weight is not None:
            experts, width = router_weight.shape
            router_weight.copy_(torch.from_numpy(np.eye(experts, width, dtype="float32")))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = keras.config.dtype_policy().variable_dtype
    return module.to(device=device, dtype=getattr(torch, dtype))
