"""The FLOPs of a model for one example."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import keras

from keras_moe.core import checks
from keras_moe.core.types import Shape
from keras_moe.flops.layer_flops import layer_flops

Shapes: TypeAlias = Shape | Sequence[Shape] | Mapping[str, Shape]


def active_flops(model: keras.layers.Layer, input_shape: Shapes | None = None) -> int:
    """Counts the FLOPs of a forward pass for one example.

    flops = 2 * sum over products of (multiplies with their add), sparse layers with k of E experts

    Products are matmuls, einsums, convolutions and attention; elementwise work, biases, norms,
    softmaxes and the weighted sum of the chosen experts count 0. A sparse layer counts router,
    shared experts and the k experts of each token, whatever the dispatch and the capacity. Masked
    attention and padding count as if there were no mask. Inside of a layer's `call`, a product is
    seen where `keras.ops` is asked for it: `a @ b` on tensors is not. Nothing is computed, and the
    model is not changed.

    Args:
        model: A built model of any kind, or a layer.
        input_shape: The shape of one example, without the batch axis, in the structure of the
            model's inputs (a dict or list of shapes for several); for models whose inputs have
            unknown axes or are not known, as those of subclassed models. Defaults to `None`.

    Returns:
        The FLOPs.

    Raises:
        ValueError: if the model is none, is not built or an input's shape is not known, or where a
            layer has a matrix, no product of `keras.ops` and no rule: see `layer_flops`.

    Example:

    >>> import keras
    >>> from keras_moe import layers
    >>> from keras_moe.flops import active_flops
    >>> inputs = keras.Input((10, 16))
    >>> model = keras.Model(inputs, layers.MoE(num_experts=8, hidden_dim=64, top_k=2)(inputs))
    >>> router, experts = 2 * 10 * 16 * 8, 2 * 10 * 2 * (16 * 64 + 64 * 16)
    >>> active_flops(model) == router + experts
    True
    """
    checks.built("model", model)
    inputs = _inputs_of_one_example(model, input_shape)
    batch = keras.tree.flatten(inputs)[0].shape[0]  # 1, unless the model fixes it
    return round(Fraction(layer_flops(model, inputs), batch))


def _inputs_of_one_example(model: keras.layers.Layer, input_shape: Shapes | None) -> Any:
    known = _known_inputs(model)
    if input_shape is None:
        inputs = known
    else:
        _check_shapes(input_shape)
        inputs = keras.tree.map_shape_structure(
            lambda shape: keras.KerasTensor((None, *shape), dtype=model.compute_dtype), input_shape
        )
        if known is not None:
            inputs = _with_known_batch_and_dtype(inputs, known)
    specs = [] if inputs is None else keras.tree.flatten(inputs)
    if not specs or any(None in spec.shape[1:] for spec in specs):
        checks.fail(
            "`input_shape` must give every size of an example, where the model does not.",
            input_shape=input_shape,
            inputs=known,
        )
    return keras.tree.map_structure(
        lambda spec: keras.KerasTensor((spec.shape[0] or 1, *spec.shape[1:]), spec.dtype), inputs
    )


def _check_shapes(input_shape: Shapes) -> None:
    """Fails if the argument is no structure of shapes. Unknown sizes are checked later."""
    sizes = [size for size in keras.tree.flatten(input_shape) if size is not None]
    is_structure = isinstance(input_shape, tuple | list | dict)
    if not is_structure or not all(isinstance(size, int) and size >= 0 for size in sizes):
        checks.fail(
            "`input_shape` must be a shape, such as (10, 16), or a dict or list of shapes.",
            input_shape=input_shape,
        )


def _with_known_batch_and_dtype(inputs: Any, known: Any) -> Any:
    try:
        keras.tree.assert_same_structure(inputs, known)
    except (TypeError, ValueError):  # which one depends on the backend
        checks.fail(
            "`input_shape` must have the structure of the model's inputs.",
            input_shape=keras.tree.map_structure(lambda spec: spec.shape[1:], inputs),
            inputs=known,
        )
    return keras.tree.map_structure(
        lambda spec, of: keras.KerasTensor((of.shape[0], *spec.shape[1:]), of.dtype), inputs, known
    )


def _known_inputs(model: keras.layers.Layer) -> Any:
    """The symbolic inputs of a functional or sequential model, None for other models."""
    if isinstance(model, keras.Sequential):
        return model.inputs[0] if model.inputs else None
    return getattr(model, "input", None)
