"""Draws of arguments in search spaces: searched, fixed, or dependent on another argument."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np

from keras_moe.core import checks

if TYPE_CHECKING:
    from keras_tuner import HyperParameters

When = tuple[str, Sequence[Any]]

_INACTIVE = object()


class Choices:
    """Draws arguments from a `keras_tuner.HyperParameters`, named `{prefix}/{argument}`.

    A list or tuple is searched, its first value the default; anything else, and a list of one
    value, is fixed and stays out of the search.

    Args:
        hp: A `keras_tuner.HyperParameters`, or an object with its methods.
        prefix: First part of the names; empty for none.
    """

    def __init__(self, hp: "HyperParameters", prefix: str = "") -> None:
        if not isinstance(prefix, str):
            checks.fail("`name` must be a string.", name=prefix)
        self._hp, self._prefix = hp, prefix
        self._candidates: dict[str, tuple[Any, ...]] = {}
        self._drawn: dict[str, Any] = {}
        self.is_active = True
        """False inside of a conditional scope that is not active, where hp has no values."""

    def full_name(self, argument: str) -> str:
        """The name of an argument among the hyperparameters."""
        return f"{self._prefix}/{argument}" if self._prefix else argument

    def draw(self, argument: str, options: Any, when: When | None = None) -> Any:
        """Returns the argument's value, or None where it is inactive.

        Args:
            argument: name of the argument.
            options: the value, or the values to choose from.
            when: an earlier argument, and those of its values for which this one is needed;
                always, if None.
        """
        values = candidates(argument, options)
        self._candidates[argument], self._drawn[argument] = values, None
        is_needed = True
        scope: AbstractContextManager[None] = nullcontext()
        if when is not None:
            parent, allowed = when
            if not any(value in allowed for value in self._candidates[parent]):
                return None
            is_needed = self._drawn[parent] in allowed
            scope = self.scope(parent, allowed)
        value = values[0]
        if len(values) > 1:
            with scope:
                value = _choose(self._hp, self.full_name(argument), values)
            self.is_active &= value is not _INACTIVE or not is_needed
        if is_needed and value is not _INACTIVE:
            self._drawn[argument] = value
        return self._drawn[argument]

    @contextmanager
    def scope(self, parent: str, allowed: Sequence[Any]) -> Iterator[None]:
        """Limits the declarations inside to some values of an earlier argument."""
        values = self._candidates[parent]
        if len(values) == 1:
            yield
            return
        labels = [
            label for value, label in zip(values, _labels(values), strict=True) if value in allowed
        ]
        with self._hp.conditional_scope(self.full_name(parent), labels):
            yield


@contextmanager
def fully_declared(hp: "HyperParameters") -> Iterator[None]:
    """Declares all conditional scopes at once, so that the tuner need not build a model for each.

    Only right where all scopes inside declare all of theirs whether they are active or not.
    """
    known = len(hp.inactive_scopes)
    yield
    del hp.inactive_scopes[known:]


def candidates(argument: str, options: Any) -> tuple[Any, ...]:
    """The values to choose from, the default first; one for an argument that is fixed."""
    if not isinstance(options, list | tuple | range):
        return (options,)
    values: list[Any] = []
    for value in options:
        # KerasTuner writes its choices to JSON.
        value = value.item() if isinstance(value, np.generic) else value
        value = tuple(value) if isinstance(value, list) else value
        if value not in values:
            values.append(value)
    if not values:
        checks.fail(
            f"`{argument}` must be a value, or a sequence of at least one value to choose from.",
            **{argument: options},
        )
    return tuple(values)


def checked(check: Callable[[str, Any], Any], argument: str, options: Any) -> Any:
    """Checks every value to choose from, and returns the argument unchanged."""
    for value in candidates(argument, options):
        check(argument, value)
    return options


def _choose(hp: "HyperParameters", name: str, values: tuple[Any, ...]) -> Any:
    """Draws one of several values; `_INACTIVE` in an inactive scope."""
    if all(isinstance(value, bool) for value in values):
        drawn = hp.Boolean(name, default=values[0])
        return _INACTIVE if drawn is None else drawn
    labels = _labels(values)
    # Sorted, because Bayesian optimisation takes neighbours in the list for neighbours in value.
    ordered = sorted(labels) if _are_numbers(labels) else labels
    drawn = hp.Choice(name, ordered, default=labels[0])
    if drawn is None:
        return _INACTIVE
    # What the caller registered under this name before, a `Float` for example, has other values.
    return values[labels.index(drawn)] if drawn in labels else drawn


def _labels(values: tuple[Any, ...]) -> list[Any]:
    """The values as the tuner stores them: themselves, or strings where it needs these.

    KerasTuner holds strings or numbers of one type.
    """
    if all(isinstance(value, bool | str) for value in values) or _are_integers(values):
        return list(values)
    if _are_numbers(values):
        return [float(value) for value in values]
    return [value.__name__ if callable(value) else str(value) for value in values]


def _are_integers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)
