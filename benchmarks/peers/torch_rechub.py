"""torch-rechub's MMOE, a whole model: batch normalisation in every layer, one output per task.

DeepCTR-Torch has one without batch normalisation, but asks a registry for its newest version
whenever it is imported, on a thread beside the measurement.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.contender import Contender
from benchmarks.peers.on_torch import prepare
from benchmarks.rows import Row

_FEATURE = "inputs"


def contenders(row: Row, inputs: np.ndarray) -> list[Contender]:
    """Its model with the row's experts and tasks, on one dense feature of width d."""
    _, width, hidden, experts, tasks = row.sizes

    def make() -> Any:
        from torch import nn
        from torch_rechub.basic.features import DenseFeature
        from torch_rechub.models.multi_task import MMOE

        class OfOneTensor(nn.Module):
            """Calls the model with the dict of features that it wants."""

            def __init__(self) -> None:
                super().__init__()
                self.model = MMOE(
                    [DenseFeature(_FEATURE, width)],
                    ["classification"] * tasks,
                    n_expert=experts,
                    expert_params={"dims": [hidden, hidden // 2]},
                    tower_params_list=[{"dims": []}] * tasks,
                )

            def forward(self, tensor: Any) -> Any:
                return self.model({_FEATURE: tensor})

        return prepare(OfOneTensor())

    return [Contender("torch-rechub MMOE", make, inputs)]
