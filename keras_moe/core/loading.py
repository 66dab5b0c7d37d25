"""Loading weights of other sizes: what differs, in the words of the constructor."""

from typing import Any

from keras_moe.core import checks
from keras_moe.core.arguments import KeepsArguments


class NamesSizes(KeepsArguments):
    """Base of layers that say which of their sizes a file of weights was not saved with.

    Keras would name the first weight that does not fit, which no user has made.
    """

    # The name of a weight, without its number, and the names of its axes.
    AXES: tuple[tuple[str, ...], ...] = ()

    def load_own_variables(self, store: Any) -> None:
        variables = self._trainable_variables + self._non_trainable_variables
        if len(store.keys()) == len(variables):
            self._check_sizes([(v, tuple(store[str(i)].shape)) for i, v in enumerate(variables)])
        super().load_own_variables(store)

    def _check_sizes(self, saved: list[tuple[Any, tuple[int, ...]]]) -> None:
        expected, received = {}, {}
        axes = {weight: names for weight, *names in self.AXES}
        for variable, shape in saved:
            names = axes.get(variable.name.rstrip("_0123456789"), [])
            if len(shape) == len(names):
                for name, here, there in zip(names, variable.shape, shape, strict=True):
                    if here != there:
                        expected[name], received[name] = here, there
        if received:
            sizes = ", ".join(f"{name}={size}" for name, size in expected.items())
            checks.fail(f"`{self.name}` must be loaded from a file with {sizes}.", **received)
