"""Every function of a backend's module, in Keras's operations: right on any backend, and slower."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from keras import ops

from keras_moe.core.numerics import edges_of
from keras_moe.core.types import Size, Tensor
from keras_moe.dispatch.layout import Rows, Stage, entries_at, wide_dtype

WALKS = False  # whether `walk` is faster than padded blocks
HAS_GROUPED_MATMUL = False  # whether `grouped_matmul` is the platform's own
DIVIDES = False  # whether there is `on_each_device`, and what is used in it


def row_padding(total: Size, num_experts: int) -> int:
    """Rows that `walk` needs behind the last one."""
    return 0


def walk(tokens: Tensor, rows: Rows, stages: Sequence[Stage]) -> Tensor:
    """Applies each token's experts and sums what they give, weighted: each expert on all rows.

    Args:
        tokens: `(N, d)`.
        rows: who goes where, with which weight, and `row_padding` empty slots behind the last one.
        stages: the layers of the experts.

    Returns:
        `(N, out)`, summed in float32 at least.
    """
    weights, slots, ends = rows.weights, rows.slots, rows.ends
    count, top_k = weights.shape
    token_of = ops.minimum(slots.assignment, count * top_k - 1) % count
    hidden = ops.take(tokens, token_of, axis=0)
    for stage in stages:
        kernels, biases = (
            [ops.cast(each, tokens.dtype) for each in weights_of]
            for weights_of in (stage.kernels, stage.biases)
        )
        sums = [grouped_matmul(hidden, kernel, ends) for kernel in kernels]
        if biases:
            experts = _expert_of(hidden, ends)
            sums = [s + ops.take(b, experts, axis=0) for s, b in zip(sums, biases, strict=True)]
        hidden = sums[0] if stage.activation is None else stage.activation(*sums)
        hidden = hidden if stage.scale is None else hidden * stage.scale
    slot_of = ops.reshape(slots.slot_of, (top_k, count))
    is_kept = ops.expand_dims(slot_of < ops.shape(hidden)[0], -1)
    chosen = ops.take(hidden, ops.where(is_kept[..., 0], slot_of, 0), axis=0)
    wide = wide_dtype(tokens)
    terms = ops.where(is_kept, ops.cast(chosen, wide), 0.0)
    terms = terms * ops.cast(ops.expand_dims(ops.transpose(weights), -1), wide)
    return ops.cast(ops.sum(terms, axis=0), tokens.dtype)


def grouped_matmul(rows: Tensor, kernel: Tensor, ends: Tensor) -> Tensor:
    """rows[start:end] @ kernel[e] for each expert e; 0 past the last one.

    Args:
        rows: `(S, in)`, sorted by expert.
        kernel: `(E, in, out)`.
        ends: int32 `(E,)`, where each expert's rows end.

    Returns:
        `(S, out)`.
    """
    place, begin, total = ops.arange(ops.shape(rows)[0], dtype="int32"), 0, 0.0
    for expert in range(kernel.shape[0]):
        end = ends[expert]
        is_own = ops.logical_and(place >= begin, place < end)
        total = total + ops.where(ops.expand_dims(is_own, -1), ops.matmul(rows, kernel[expert]), 0)
        begin = end
    return total


def _expert_of(rows: Tensor, ends: Tensor) -> Tensor:
    place = ops.arange(ops.shape(rows)[0], dtype="int32")
    is_past = ops.cast(ops.expand_dims(place, -1) >= ends, "int32")
    return ops.minimum(ops.sum(is_past, axis=-1), ends.shape[0] - 1)


def may_have_grouped_matmul(is_known: bool) -> bool:
    """Whether this kind of device has a `grouped_matmul` that beats a walk."""
    return False


def is_on_cpu(tensor: Tensor) -> bool:
    """Whether what is computed from a tensor, traced or not, is computed on a CPU."""
    return False


def without_autocast() -> AbstractContextManager[Any]:
    """A context in which float32 stays float32, whatever mode the backend is in."""
    return nullcontext()


def is_recomputing() -> bool:
    """Whether the backend repeats a call in a backward pass: it is counted already."""
    return False


def reach(outputs: Tensor, variables: Sequence[Tensor]) -> Tensor:
    """The outputs, by which each variable has a gradient, 0 where it took no part in them."""
    return outputs


def is_traced_for_export() -> bool:
    """Whether the call is traced for export, as far as the backend tells."""
    return False


def sort_for_export(bin_of: Tensor, num_bins: Size) -> tuple[Tensor, Tensor]:
    """The order that sorts assignments by bin, and the bins' edges, as export formats take it."""
    order = ops.cast(ops.argsort(bin_of), "int32")
    return order, edges_of(entries_at(bin_of, order), num_bins)


def inverse_permutation(order: Tensor) -> Tensor:
    """Where each entry of a permutation stands, int32."""
    total = ops.shape(order)[0]
    return ops.scatter(ops.expand_dims(order, -1), ops.arange(total, dtype="int32"), (total,))


def with_gradient(
    function: Callable[..., Tensor],
    gradient: Callable[..., tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    fixed: tuple[Tensor, ...],
) -> Tensor:
    """function(*inputs, *fixed) with the gradient gradient(upstream, *inputs, *fixed)."""

    @ops.custom_gradient
    def run(*inputs: Tensor) -> Any:
        def backward(*args: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
            return gradient(args[-1] if upstream is None else upstream, *inputs, *fixed)

        return function(*inputs, *fixed), backward

    return run(*inputs)


def eagerly(function: Callable[[], Any]) -> Any:
    """Runs a function now, also while a program is being traced, and waits for it."""
    return function()


def value_and_gradients(function: Callable[..., Tensor], *arguments: Tensor) -> tuple[Any, Any]:
    """The value of a function, and the gradients of the sum of its squares."""
    raise NotImplementedError("Keras has no gradients that are the same on every backend.")


def on_each_device(
    function: Callable[..., Any], mesh: Any, inputs: Any, inputs_by: Any, outputs_by: Any
) -> Any:
    """Runs a function on each device of a mesh, on its part of the inputs.

    Args:
        function: of the parts of the inputs.
        mesh: a `keras.distribution.DeviceMesh`.
        inputs: a tuple of trees of arrays.
        inputs_by: for each, the mesh's axis that divides each axis of an array, or None.
        outputs_by: the same for what the function returns.
    """
    raise NotImplementedError("Keras divides nothing among devices on this backend.")


def device_index(axes: tuple[str, ...]) -> Tensor:
    """Where a device stands along axes of the mesh, in `on_each_device`."""
    raise NotImplementedError("Keras divides nothing among devices on this backend.")


def sum_over_devices(value: Tensor, axes: tuple[str, ...]) -> Tensor:
    """The sum over the devices along axes of the mesh, in `on_each_device`."""
    raise NotImplementedError("Keras divides nothing among devices on this backend.")


def segment_sum(values: Tensor, segments: Tensor, num_segments: Size) -> Tensor:
    """The sums of entries `(n, ...)` by the segment `(n,)` that each belongs to."""
    return ops.segment_sum(values, segments, num_segments=num_segments)


def sum_over_replicas(values: Sequence[Tensor]) -> Sequence[Tensor]:
    """The sums of float32 values over the replicas of a data-parallel training, without gradient.

    Values of one device's program, as on JAX, are of the whole batch already.
    """
    return values
