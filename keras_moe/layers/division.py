"""Calls divided among the devices of a `keras.distribution`: each carries its own tokens."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeAlias

import keras
from keras import ops
from keras.src.backend import AutocastScope

from keras_moe.core.exporting import is_exporting
from keras_moe.core.records import Routing
from keras_moe.core.types import Axes, Size, Tensor
from keras_moe.dispatch import backend
from keras_moe.dispatch.layout import wide_dtype
from keras_moe.layers.scopes import Inside, random_states

Function: TypeAlias = Callable[[Tensor, Routing, Axes], tuple[Tensor, Tensor]]

_APART = 0x9E3779B9  # between the seeds of two devices


class Division(NamedTuple):
    """Axes of a mesh of devices that divide the work of a layer's experts.

    Attributes:
        mesh: The `keras.distribution.DeviceMesh`.
        tokens: The axis by which examples are divided, or None.
        experts: The axis by which experts are divided, or None.
    """

    mesh: keras.distribution.DeviceMesh
    tokens: str | None
    experts: str | None

    def size(self, axis: str | None) -> int:
        """How many devices there are along an axis."""
        return 1 if axis is None else int(self.mesh.shape[self.mesh.axis_names.index(axis)])

    def run(
        self, function: Function, layer: Any, tokens: Tensor, routing: Routing, axes: Axes
    ) -> tuple[Tensor, Tensor]:
        """As `divided`."""
        experts, chooses_tokens = layer.experts, layer.router.chooses_tokens
        own_axes = (axes[0] // self.size(self.tokens), *axes[1:])
        with AutocastScope(None):
            state = {id(variable): (variable, variable.value) for variable in experts.variables}
        variables = [variable for variable, _ in state.values()]
        seeds = {id(seed) for layer in experts._flatten_layers() for seed in random_states(layer)}
        changed: list[Any] = []

        def on_a_device(
            tokens: Tensor, record: tuple[Tensor, ...], values: list[Tensor]
        ) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor]]:
            offset = self._offset()
            start = [
                value + offset if id(variable) in seeds else value
                for variable, value in zip(variables, values, strict=True)
            ]
            own = self._own(routing, record, experts.num_experts, chooses_tokens)
            with (
                _with_some_of(experts, self.size(self.experts)),
                Inside(zip(variables, start, strict=True)) as scope,
            ):
                outputs, kept = function(tokens, own, own_axes)
                losses = [self._mean(loss) for loss in scope.losses]
                experts._clear_losses()  # which are added outside
                after = [scope.get_current_value(variable) for variable in variables]
            moved = [
                (variable, new)
                for variable, old, new in zip(variables, start, after, strict=True)
                if new is not old
            ]
            changed[:] = [variable for variable, _ in moved]
            news = [
                new - offset if id(variable) in seeds else self._mean(new)
                for variable, new in moved
            ]
            return *self._joined(outputs, kept, chooses_tokens), news, losses

        row, score = (self.tokens,), (self.tokens, self.experts if chooses_tokens else None)
        divided = {id(weight) for weight in experts.weights}
        parts = [(self.experts,) if id(each) in divided else () for each in variables]
        outputs, kept, news, losses = backend.current.on_each_device(
            on_a_device,
            self.mesh,
            (
                tokens,
                (routing.experts, routing.weights, routing.kept),
                [value for _, value in state.values()],
            ),
            (row, (row, score, score), parts),
            (row, score, (), ()),
        )
        for variable, new in zip(changed, news, strict=True):
            variable.assign(new)
        for loss in losses:
            layer.add_loss(loss)
        return outputs, kept

    def _own(
        self, routing: Routing, record: tuple[Tensor, ...], num_experts: int, chooses_tokens: bool
    ) -> Routing:
        """The record of a device's tokens: who goes to its experts, counted from its first one."""
        chosen, weights, kept = record
        if self.experts is not None and not chooses_tokens:
            here = num_experts // self.size(self.experts)
            chosen = chosen - here * backend.current.device_index((self.experts,))
            is_here = ops.logical_and(chosen >= 0, chosen < here)
            kept, chosen = ops.logical_and(kept, is_here), ops.where(is_here, chosen, 0)
        return routing._replace(experts=chosen, weights=weights, kept=kept, asked=kept)

    def _joined(self, outputs: Tensor, kept: Tensor, chooses_tokens: bool) -> tuple[Tensor, Tensor]:
        """The sums over the devices that divide the experts, and what these kept."""
        if self.experts is None:
            return outputs, kept
        total = backend.current.sum_over_devices
        if not chooses_tokens:
            kept = total(ops.cast(kept, "int32"), (self.experts,)) > 0
        sums = total(ops.cast(outputs, wide_dtype(outputs)), (self.experts,))
        return ops.cast(sums, outputs.dtype), kept

    def _axes(self) -> tuple[str, ...]:
        return tuple(axis for axis in (self.tokens, self.experts) if axis is not None)

    def _offset(self) -> Tensor:
        """What a device adds to random states, uint32 `(2,)`."""
        index = ops.cast(backend.current.device_index(self._axes()), "uint32")
        return ops.stack([index * ops.cast(_APART, "uint32"), ops.zeros_like(index)])

    def _mean(self, value: Tensor) -> Tensor:
        """The mean over devices, in the value's dtype."""
        count = self.size(self.tokens) * self.size(self.experts)
        total = backend.current.sum_over_devices(value, self._axes())
        return ops.cast(total / count, value.dtype)


@contextlib.contextmanager
def _with_some_of(experts: Any, devices: int) -> Iterator[None]:
    """A bank that counts the experts of one device."""
    settings, whole = vars(experts), experts.num_experts  # past the check of who sets it
    settings["num_experts"] = whole // devices
    try:
        yield
    finally:
        settings["num_experts"] = whole


def divided(
    function: Function, layer: Any, tokens: Tensor, routing: Routing, axes: Axes
) -> tuple[Tensor, Tensor]:
    """Sends tokens to experts; under a `keras.distribution` on each device its part of both.

    Random numbers differ by device. What experts change besides random states, such as moving
    averages, and the losses that they add are means over devices.

    Args:
        function: `(tokens, routing, axes) -> (outputs, kept)`. Of the bank it sees the device's own
            experts, and of the record those who go to these.
        layer: The layer, with its `router` and its bank `experts`.
        tokens: `(N, d)`.
        routing: The record of the router.
        axes: Sizes of the axes that the tokens were flattened from, batch first.

    Returns:
        The outputs `(N, out)` and the kept assignments `(N, k)`.
    """
    division = _division_of(layer.experts, axes[0])
    if division is None:
        return function(tokens, routing, axes)
    return division.run(function, layer, tokens, routing, axes)


def _division_of(experts: Any, examples: Size) -> Division | None:
    """The division of a call by the distribution in force; None where nothing is to be divided."""
    distribution = keras.distribution.distribution()
    if distribution is None or is_exporting():
        return None
    mesh, batch = distribution.device_mesh, distribution.batch_dim_name
    axes = [distribution.get_variable_layout(weight).axes for weight in experts.weights]
    used = {axis for each in axes for axis in each if axis is not None}
    first = {each[0] for each in axes if each and each[0] is not None}
    if len(used) > 1 or used != first or batch in used:
        return None  # weights divided along another axis: XLA divides what it can
    division = Division(mesh, batch, first.pop() if first else None)
    if experts.num_experts % division.size(division.experts):
        return None
    is_whole = isinstance(examples, int) and examples % division.size(batch) == 0
    if not is_whole or division.size(batch) == 1:
        division = division._replace(tokens=None)
    if division.size(division.experts) == 1:
        division = division._replace(experts=None)
    return division if division._axes() else None
