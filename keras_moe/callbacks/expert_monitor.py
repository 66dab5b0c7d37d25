"""Whether the experts live, in the progress bar and in the history."""

from collections import Counter
from typing import Any

import keras
import numpy as np

from keras_moe import _checks

Counts = dict[str, Any]


@keras.saving.register_keras_serializable(package="keras_moe")
class ExpertMonitor(keras.callbacks.Callback):
    """Shows two or three scalars per mixture layer in `fit`'s progress bar and in `history`.

    For each layer that counts (`MoE`, `SwitchFFN`, `SoftMoE`, `MMoE`, at any depth of the model),
    over the epoch so far, padding excluded:

    - `{layer}/load_cv`: standard deviation of the experts' load, assignments before drops, over its
      mean. 0 is perfect balance, sqrt(E - 1) one expert taking everything. Where all experts take
      part, `{layer}/importance_cv`, the same of their importance: of the combine weights of
      `SoftMoE`, of the gate weights of `MMoE` (the mean over tasks).
    - `{layer}/dropped`: share of assignments dropped for lack of capacity; only for layers that
      have a capacity.
    - `{layer}/entropy`: mean entropy of the router in nats, between 0 and log(E); for `SoftMoE`
      over its slots, for `MMoE` the mean over tasks.

    Args:
        every: Positive integer, the batches between two looks at the counts. A look waits for the
            device, so a large model on an accelerator wants 10 or more. Defaults to `1`.

    Example:

    >>> import keras, keras_moe, numpy as np
    >>> model = keras.Sequential([keras_moe.layers.MoE(4, 8, name="moe"), keras.layers.Dense(1)])
    >>> model.compile("sgd", "mse")
    >>> x = np.random.default_rng(0).normal(size=(32, 8)).astype("float32")
    >>> history = model.fit(
    ...     x, x[:, :1], verbose=0, callbacks=[keras_moe.callbacks.ExpertMonitor()]
    ... )
    >>> sorted(history.history)
    ['loss', 'moe/entropy', 'moe/load_cv']
    """

    def __init__(self, every: int = 1) -> None:
        super().__init__()
        self.every = _checks.positive_int("every", every)
        self._layers: list[Any] = []
        self._before: list[Counts] = []
        self._latest: dict[str, float] = {}

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._layers = counting_layers(self.model)
        self._before = self._read()
        self._latest = {}

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        if (batch + 1) % self.every == 0:
            self._look()
        if logs is not None:
            logs.update(self._latest)

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        self._look()
        if logs is not None:
            logs.update(self._latest)

    def _look(self) -> None:
        self._latest = {
            f"{name}/{key}": value
            for (name, layer), now, before in zip(
                unique_names(self._layers), self._read(), self._before, strict=True
            )
            for key, value in health(now, before, getattr(layer, "capacity_factor", None)).items()
        }

    def _read(self) -> list[Counts]:
        # The JAX trainer keeps the state outside of the variables until it is asked for.
        getattr(self.model, "jax_state_sync", _nothing)()
        return [layer.running_counts() for layer in self._layers]

    def get_config(self) -> dict[str, Any]:
        return {"every": self.every}


def counting_layers(model: Any) -> list[Any]:
    """All layers of a model, nested ones too, that keep running counts."""
    return [
        layer
        for layer in model._flatten_layers(include_self=False)
        if callable(getattr(layer, "running_counts", None)) and layer.built
    ]


def unique_names(layers: list[Any]) -> list[tuple[str, Any]]:
    """Names the layers by their own name: "moe", then "moe#2" for a second "moe"."""
    seen: Counter[str] = Counter()
    named = []
    for layer in layers:
        seen[layer.name] += 1
        count = seen[layer.name]
        named.append((layer.name if count == 1 else f"{layer.name}#{count}", layer))
    return named


def health(now: Counts, before: Counts, capacity_factor: float | None) -> dict[str, float]:
    """The scalars of what was counted between two reads."""
    new = {key: np.asarray(now[key] - before[key]) for key in now}
    measure = "load" if "load" in new else "importance"
    amounts = np.atleast_2d(new[measure])
    mean = np.maximum(amounts.mean(axis=-1), 1e-12)
    values = {f"{measure}_cv": float((amounts.std(axis=-1) / mean).mean())}
    if capacity_factor is not None:
        values["dropped"] = float(new["dropped"] / max(float(new["assignments"]), 1.0))
    values["entropy"] = float((new["entropy"] / max(float(new["decisions"]), 1.0)).mean())
    return values


def _nothing() -> None:
    """Stands in where the trainer has no state to bring home."""
