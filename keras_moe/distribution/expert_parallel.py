"""The distribution that gives each device some of the experts."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import distribution

from keras_moe.core import checks
from keras_moe.core.types import Shape

BATCH, EXPERT = "batch", "expert"  # the mesh's axes

# Of every bank of experts, in any layer; the optimizer's moments go with their weights.
_RULES = {
    r"(.*/)?experts/(gate_)?kernel_\d+": (EXPERT, None, None),
    r"(.*/)?experts/(gate_)?bias_\d+": (EXPERT, None),
}


class ExpertParallel(distribution.ModelParallel):
    """`keras.distribution.ModelParallel` that says what does not divide, and by what.

    Args:
        **kwargs: Arguments of `ModelParallel`.
    """

    def get_variable_layout(self, variable: Any) -> Any:
        layout = super().get_variable_layout(variable)
        for size, axis in zip(variable.shape, layout.axes, strict=True):
            devices = self._size(axis)
            if size % devices:
                checks.fail(
                    f"The mesh must divide what its rules divide: `{variable.path}` has an axis of "
                    f"{size}, and the mesh's axis {axis!r} has {devices} devices. Take a number of "
                    "experts that is a multiple of the devices, or fewer devices.",
                    shape=tuple(variable.shape),
                    mesh=tuple(self.device_mesh.shape),
                )
        return layout

    def get_data_layout(self, data_shape: Shape) -> Any:
        devices, examples = self._size(self.batch_dim_name), data_shape[0]
        if examples is not None and examples % devices:
            checks.fail(
                f"A batch must be a multiple of the mesh's axis {self.batch_dim_name!r}, which has "
                f"{devices} devices: choose `batch_size` so, and leave out what is left of an "
                "epoch, as `tf.data.Dataset.batch(drop_remainder=True)` does.",
                examples=examples,
            )
        return super().get_data_layout(data_shape)

    def _size(self, axis: str | None) -> int:
        """Devices along an axis of the mesh."""
        mesh = self.device_mesh
        return 1 if axis is None else int(mesh.shape[mesh.axis_names.index(axis)])


def expert_parallel(
    devices: Sequence[str] | None = None,
    data: int = 1,
    rules: Mapping[str, tuple[str | None, ...]] | None = None,
    auto_shard_dataset: bool = True,
) -> ExpertParallel:
    """Returns a distribution under which devices divide the experts of all layers, and batches.

    The devices are a mesh of the axes `"batch"`, of `data` devices, and `"expert"`. Each device has
    E / (devices along `"expert"`) experts of each layer and what an optimizer keeps for them; all
    other weights are on every device. Each runs its own experts on the tokens of its part of the
    batch, and the sums over the devices are the outputs: no weight of an expert is ever moved, and
    without a capacity nothing is dropped. With a capacity, each part of the batch fills slots of
    its own.

    Args:
        devices: Names of devices, as of `keras.distribution.list_devices`; None for all.
            Defaults to `None`.
        data: Positive integer that divides the devices, how many parts a batch is divided into.
            Defaults to `1`.
        rules: Optional layouts of other variables, by the pattern of their path, on the same axes.
            Defaults to `None`.
        auto_shard_dataset: Whether `fit` deals out a `tf.data.Dataset` to several processes, as in
            `keras.distribution.ModelParallel`; False where each process feeds its own part.
            Defaults to `True`.

    Returns:
        A distribution for `keras.distribution.set_distribution`, before the model is made.

    Raises:
        ValueError: On another backend than JAX, or where `data` does not divide the devices. Later,
            on experts or batches that the mesh does not divide.

    Example:

    >>> import keras
    >>> import keras_moe
    >>> distribution = keras_moe.distribution.expert_parallel(["cpu:0"])  # as of all devices
    >>> keras.distribution.set_distribution(distribution)
    >>> # make the model, compile it and fit it
    >>> keras.distribution.set_distribution(None)
    """
    if keras.backend.backend() != "jax":
        checks.fail(
            "Experts are divided among devices on JAX only: set KERAS_BACKEND=jax.",
            backend=keras.backend.backend(),
        )
    names = list(distribution.list_devices() if devices is None else devices)
    checks.positive_int("data", data)
    if not names or len(names) % data:
        checks.fail(f"`data` must divide the number of devices, {len(names)}.", data=data)
    mesh = distribution.DeviceMesh((data, len(names) // data), [BATCH, EXPERT], names)
    layout = distribution.LayoutMap(mesh)
    for pattern, axes in {**_RULES, **(rules or {})}.items():
        layout[pattern] = axes
    return ExpertParallel(
        layout_map=layout, batch_dim_name=BATCH, auto_shard_dataset=auto_shard_dataset
    )
