"""The last epoch of a training, from the file of a monitor."""

import json
from pathlib import Path
from typing import NamedTuple

import keras
import numpy as np

from keras_moe.core import checks
from keras_moe.inspection.health import Counts, amounts_of


class LastEpoch(NamedTuple):
    """What was counted in the last epoch.

    Attributes:
        epoch: from 0.
        counts: by layer name.
    """

    epoch: int
    counts: dict[str, Counts]


def last_epoch(path: str | Path, named: list[tuple[str, keras.layers.Layer]]) -> LastEpoch:
    """Reads the last line of a file that `ExpertMonitor(json=path)` wrote.

    Raises:
        ValueError: where it has no epoch, or is that of another model.
    """
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    if not lines:
        checks.fail("`history` must be a file with at least one epoch.", history=str(path))
    row = json.loads(lines[-1])
    counts = {
        name: {key: np.asarray(value, dtype=np.float64) for key, value in counted.items()}
        for name, counted in row["counts"].items()
    }
    known = {name: layer.num_experts for name, layer in named}
    found = {name: amounts_of(counted)[1].shape[-1] for name, counted in counts.items()}
    if not found.items() <= known.items():
        checks.fail(
            f"`history` must be of this model, whose mixtures have the experts {known}.",
            history=str(path),
            experts=found,
        )
    return LastEpoch(row["epoch"], counts)
