"""Modes of PyTorch around a call that Keras does not know of: autocast and checkpointing."""

from contextlib import ExitStack
from typing import Any

import keras

_DEVICES = ("cpu", "cuda", "mps", "xpu")


def without_autocast() -> ExitStack[Any]:
    """A context in which `torch.autocast` leaves float32 as it is: it casts inputs of products.

    A router in bfloat16 sends 1 to 5 % of the tokens to other experts. Nothing on other backends.
    """
    stack = ExitStack()
    if keras.backend.backend() == "torch":
        import torch

        for device in _DEVICES:
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
    return stack


def is_recomputing() -> bool:
    """Whether `torch.utils.checkpoint` repeats a call, inside of a backward pass.

    What a call counts or adapts belongs to its first run. What it computes must stay the same: a
    checkpoint compares the tensors that both runs save.
    """
    if keras.backend.backend() != "torch":
        return False
    import torch

    return bool(torch._C._current_graph_task_id() != -1)
