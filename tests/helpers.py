"""Values and gradients of a layer as NumPy arrays, the same way on every backend."""

from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

TOLERANCE = 1e-5  # of an array's largest entry, float32 against a float64 oracle

# Below this size an array that is zero in exact arithmetic holds rounding only.
_SMALLEST_SCALE = 1e-2


def some_everywhere(cases: Iterable[Any], everywhere: Iterable[str], reason: str) -> list[Any]:
    """Parameters for a test: PyTorch runs all cases, the other backends those named.

    Args:
        cases: the names of cases, or their values by name; a tuple has one for each argument.
        everywhere: names of the cases that stand for the others on a backend that compiles.
        reason: why no backend can break the others alone.
    """
    values = cases if isinstance(cases, dict) else {str(case): case for case in cases}
    everywhere = set(everywhere)
    assert everywhere and everywhere <= set(values), everywhere - set(values)
    of_one = pytest.mark.one_backend(reason)
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else [value]),
            id=name,
            marks=() if name in everywhere else of_one,
        )
        for name, value in values.items()
    ]


def path_of(layer: keras.layers.Layer, variable: Any) -> str:
    """A variable's path inside the layer, `router/kernel`."""
    return variable.path.removeprefix(f"{layer.name}/")


def randomize_weights(layer: keras.layers.Layer, seed: int = 0, size: float = 0.7) -> None:
    """Gives every trainable weight, biases too, values that no gradient can hide behind."""
    rng = np.random.default_rng(seed)
    for variable in layer.trainable_variables:
        variable.assign(size * rng.normal(size=variable.shape).astype("float32"))


def set_weights(layer: keras.layers.Layer, values: dict[str, np.ndarray]) -> None:
    """Sets trainable weights by path; every one of them must be named."""
    by_path = {path_of(layer, variable): variable for variable in layer.trainable_variables}
    assert set(by_path) == set(values), (sorted(by_path), sorted(values))
    for path, value in values.items():
        by_path[path].assign(value)


def weights_of(layer: keras.layers.Layer) -> dict[str, np.ndarray]:
    """The trainable weights by path."""
    return {path_of(layer, v): ops.convert_to_numpy(v) for v in layer.trainable_variables}


class Differentiable:
    """Calls a built layer and differentiates sum(outputs * cotangents) + sum of its losses.

    On JAX the call is compiled, once per shape, which is also how users run it; elsewhere eager.

    Args:
        layer: a built layer.
        outputs_of: takes the outputs out of what the call returns, which may hold more.
        **static: arguments of the call that are no tensors.
    """

    def __init__(
        self, layer: keras.layers.Layer, outputs_of: Any = lambda result: result, **static: Any
    ) -> None:
        self._layer, self._outputs_of, self._static = layer, outputs_of, static
        self._on_jax = None

    def __call__(
        self, inputs: np.ndarray, cotangents: Any, **tensors: Any
    ) -> tuple[Any, list[np.ndarray], dict[str, np.ndarray]]:
        """Returns what the call returned, the layer's losses, and the gradients by path.

        All as NumPy arrays; the gradient of the inputs is called "inputs".
        """
        tensors = {name: ops.convert_to_tensor(value) for name, value in tensors.items()}
        cotangents = [ops.convert_to_tensor(c) for c in keras.tree.flatten(cotangents)]
        differentiate = {
            "jax": self._with_jax,
            "tensorflow": self._with_tensorflow,
            "torch": self._with_torch,
        }[keras.backend.backend()]
        result, losses, gradients = differentiate(inputs, cotangents, tensors)
        to_numpy = ops.convert_to_numpy
        paths = ["inputs", *(path_of(self._layer, v) for v in self._layer.trainable_variables)]
        return (
            keras.tree.map_structure(to_numpy, result),
            [to_numpy(loss) for loss in losses],
            dict(zip(paths, (to_numpy(g) for g in gradients), strict=True)),
        )

    def _objective(self, result: Any, losses: list[Any], cotangents: list[Any]) -> Any:
        outputs = keras.tree.flatten(self._outputs_of(result))
        terms = [ops.sum(y * c) for y, c in zip(outputs, cotangents, strict=True)]
        return sum(terms + list(losses), start=0.0)

    def _with_jax(self, inputs: Any, cotangents: Any, tensors: Any) -> Any:
        import jax

        def scalar(differentiated: Any, state: Any, cotangents: Any, tensors: Any) -> Any:
            x, trainable = differentiated
            result, _, losses = self._layer.stateless_call(
                trainable, state, x, return_losses=True, **tensors, **self._static
            )
            return self._objective(result, losses, cotangents), (result, losses)

        if self._on_jax is None:
            self._on_jax = jax.jit(jax.grad(scalar, has_aux=True))
        trainable = [v.value for v in self._layer.trainable_variables]
        state = [v.value for v in self._layer.non_trainable_variables]
        (dx, dweights), (result, losses) = self._on_jax(
            (ops.convert_to_tensor(inputs), trainable), state, cotangents, tensors
        )
        return result, losses, [dx, *dweights]

    def _with_tensorflow(self, inputs: Any, cotangents: Any, tensors: Any) -> Any:
        import tensorflow as tf

        x = tf.convert_to_tensor(inputs)
        with tf.GradientTape() as tape:
            tape.watch(x)
            result = self._layer(x, **tensors, **self._static)
            losses = self._layer.losses
            scalar = self._objective(result, losses, cotangents)
        gradients = tape.gradient(
            scalar,
            [x, *(v.value for v in self._layer.trainable_variables)],
            unconnected_gradients=tf.UnconnectedGradients.ZERO,
        )
        return result, losses, [tf.convert_to_tensor(g) for g in gradients]

    def _with_torch(self, inputs: Any, cotangents: Any, tensors: Any) -> Any:
        import torch

        x = ops.convert_to_tensor(inputs).clone().requires_grad_(True)
        result = self._layer(x, **tensors, **self._static)
        losses = self._layer.losses
        gradients = torch.autograd.grad(
            self._objective(result, losses, cotangents),
            [x, *(v.value for v in self._layer.trainable_variables)],
            allow_unused=True,
            materialize_grads=True,
        )
        return result, losses, list(gradients)


def values_and_gradients(
    layer: keras.layers.Layer,
    inputs: np.ndarray,
    cotangents: Any,
    outputs_of: Any = lambda result: result,
    **call_arguments: Any,
) -> tuple[Any, list[np.ndarray], dict[str, np.ndarray]]:
    """`Differentiable` for one call: NumPy arrays among the arguments are its tensors."""
    tensors = {k: v for k, v in call_arguments.items() if isinstance(v, np.ndarray)}
    static = {k: v for k, v in call_arguments.items() if k not in tensors}
    return Differentiable(layer, outputs_of, **static)(inputs, cotangents, **tensors)


class Callable:
    """Calls a built layer; compiled on JAX, once per shape, and eager elsewhere.

    Args:
        layer: a built layer.
        **static: arguments of the call that are no tensors.
    """

    def __init__(self, layer: keras.layers.Layer, **static: Any) -> None:
        self._layer, self._static, self._on_jax = layer, static, None

    def __call__(self, inputs: np.ndarray, **tensors: Any) -> tuple[Any, list[np.ndarray]]:
        """Returns what the call returned and the layer's losses, as NumPy arrays."""
        tensors = {name: ops.convert_to_tensor(value) for name, value in tensors.items()}
        if keras.backend.backend() == "jax":
            result, losses = self._with_jax(inputs, tensors)
        else:
            result = self._layer(inputs, **tensors, **self._static)
            losses = self._layer.losses
        to_numpy = ops.convert_to_numpy
        return keras.tree.map_structure(to_numpy, result), [to_numpy(loss) for loss in losses]

    def _with_jax(self, inputs: Any, tensors: Any) -> Any:
        import jax

        def stateless(trainable: Any, state: Any, x: Any, tensors: Any) -> Any:
            return self._layer.stateless_call(
                trainable, state, x, return_losses=True, **tensors, **self._static
            )

        if self._on_jax is None:
            self._on_jax = jax.jit(stateless)
        result, state, losses = self._on_jax(
            [v.value for v in self._layer.trainable_variables],
            [v.value for v in self._layer.non_trainable_variables],
            ops.convert_to_tensor(inputs),
            tensors,
        )
        for variable, value in zip(self._layer.non_trainable_variables, state, strict=True):
            variable.assign(value)
        return result, losses


def call(
    layer: keras.layers.Layer, inputs: np.ndarray, **call_arguments: Any
) -> tuple[Any, list[np.ndarray]]:
    """`Callable` for one call: NumPy arrays among the arguments are its tensors."""
    tensors = {k: v for k, v in call_arguments.items() if isinstance(v, np.ndarray)}
    static = {k: v for k, v in call_arguments.items() if k not in tensors}
    return Callable(layer, **static)(inputs, **tensors)


def relative_error(actual: Any, expected: Any) -> float:
    """The largest difference over the largest entry of `expected`."""
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if expected.size == 0:
        return 0.0
    error = np.max(np.abs(actual - expected))
    return float(error / max(np.max(np.abs(expected)), _SMALLEST_SCALE))


def assert_close(actual: Any, expected: Any, what: str, tolerance: float = TOLERANCE) -> float:
    """Fails unless equal to `tolerance` of the largest entry; NaN fails. Returns the error."""
    error = relative_error(actual, expected)
    assert error <= tolerance, f"{what}: relative error {error:.2e}"
    return error


def assert_all_close(
    actual: dict[str, Any], expected: dict[str, Any], tolerance: float = TOLERANCE
) -> float:
    """`assert_close` over dicts of the same names. Returns the largest error."""
    assert set(actual) == set(expected), (sorted(actual), sorted(expected))
    return max(assert_close(actual[n], expected[n], n, tolerance) for n in sorted(expected))
