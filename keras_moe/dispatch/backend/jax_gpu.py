"""A grouped matmul for JAX on a GPU: Pallas kernels that Triton compiles.

XLA lowers `lax.ragged_dot` on a GPU to a product of all rows with every expert. Here a program
multiplies one block of rows of one expert with one block of that expert's columns, and blocks
begin where an expert's rows begin, so that no block holds rows of two experts and no row is moved.
How many blocks there are in all has a static bound; the last ones may have nothing to do.

The gradient by the rows is the same product with transposed kernels. That by the kernels is for
each expert a product of its rows, whose number is known at run time only: a loop over them inside
of the kernel. Sums are taken in float32.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

from keras_moe.core.types import Tensor

_GROUP = 8  # blocks of rows that share their reading of an expert's columns


class Tiles(NamedTuple):
    """Sizes of the blocks that a program of the GPU computes with.

    Attributes:
        rows: rows of a block; of a gradient by kernels, its rows.
        columns: its columns.
        depth: what is read at once of the dimension that is summed over.
        warps: warps of 32 threads per program.
        stages: reads that are under way at once.
    """

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int


class Tiling(NamedTuple):
    """Tiles of the product and of the gradient by the kernels."""

    product: Tiles
    of_kernels: Tiles
    interpret: bool = False


def tiling(total: int, num_experts: int, itemsize: int, interpret: bool = False) -> Tiling:
    """Tiles for a number of rows.

    Args:
        total: rows of all experts.
        num_experts: the experts E.
        itemsize: bytes of an entry.
        interpret: whether the kernels run as JAX's own operations, on any device.
    """
    mean = max(total // num_experts, 1)
    if itemsize > 2:  # float32: twice the bytes of a block
        large = Tiles(128, 128, 32, 8, 3)
        return Tiling(large if mean >= 64 else Tiles(16, 128, 64, 4, 3), large, interpret)
    large = Tiles(128, 256, 64, 8, 3)
    if mean >= 64:
        return Tiling(large, large, interpret)
    return Tiling(Tiles(16, 128, 128, 4, 4), large, interpret)


def grouped_matmul(
    rows: Tensor, kernel: Tensor, ends: Tensor, tiles: Tiling | None = None
) -> Tensor:
    """rows[start:end] @ kernel[e] for each expert e; 0 behind the last one's rows.

    Args:
        rows: `(S, in)`, sorted by expert, S a number.
        kernel: `(E, in, out)`.
        ends: int32 `(E,)`, where each expert's rows end.
        tiles: None for those of `tiling`.

    Returns:
        `(S, out)`.
    """
    if rows.shape[0] == 0:  # no block of nothing can be read
        return jnp.zeros((0, kernel.shape[2]), rows.dtype)
    if tiles is None:
        tiles = tiling(rows.shape[0], kernel.shape[0], rows.dtype.itemsize)
    return _product(tiles, False, rows, kernel, ends)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(
    tiling: Tiling, is_transposed: bool, rows: Tensor, kernel: Tensor, ends: Tensor
) -> Tensor:
    """Multiplies each expert's rows with its kernel, or with its transposed kernel."""
    return _run_product(tiling, is_transposed, rows, kernel, ends)


def _product_forward(tiling: Tiling, is_transposed: bool, *inputs: Tensor) -> tuple[Tensor, Any]:
    return _product(tiling, is_transposed, *inputs), inputs


def _product_backward(tiling: Tiling, is_transposed: bool, inputs: Any, upstream: Tensor) -> Any:
    rows, kernel, ends = inputs
    pair = (upstream, rows) if is_transposed else (rows, upstream)
    return (
        _product(tiling, not is_transposed, upstream, kernel, ends),
        _by_kernels(tiling, *pair, ends),
        None,
    )


_product.defvjp(_product_forward, _product_backward)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernels(tiling: Tiling, rows: Tensor, upstream: Tensor, ends: Tensor) -> Tensor:
    """rows[start:end]^T @ upstream[start:end] for each expert, `(E, in, out)`."""
    return _run_by_kernels(tiling, rows, upstream, ends)


def _by_kernels_forward(tiling: Tiling, *inputs: Tensor) -> tuple[Tensor, Any]:
    return _by_kernels(tiling, *inputs), inputs


def _by_kernels_backward(tiling: Tiling, inputs: Any, grad_kernels: Tensor) -> Any:
    rows, upstream, ends = inputs
    return (
        _product(tiling, True, upstream, grad_kernels, ends),
        _product(tiling, False, rows, grad_kernels, ends),
        None,
    )


_by_kernels.defvjp(_by_kernels_forward, _by_kernels_backward)


@partial(jax.jit, static_argnums=(0, 1))
def _run_product(
    tiling: Tiling, is_transposed: bool, rows: Tensor, kernel: Tensor, ends: Tensor
) -> Tensor:
    tiles = tiling.product
    total, num_experts = rows.shape[0], kernel.shape[0]
    width = kernel.shape[1 if is_transposed else 2]
    # What stands behind the last expert's rows is a group too, whose product is 0.
    ends = jnp.concatenate([ends, jnp.full_like(ends[:1], total)])
    starts = _starts(ends)
    blocks_of = (ends - starts + (tiles.rows - 1)) // tiles.rows
    block_ends = jnp.cumsum(blocks_of)
    num_blocks = total // tiles.rows + num_experts + 1
    block = jnp.arange(num_blocks, dtype="int32")
    group = jnp.sum(block_ends[None, :] <= block[:, None], axis=-1, dtype="int32")
    group = jnp.minimum(group, num_experts)
    row_of = starts[group] + (block - (block_ends - blocks_of)[group]) * tiles.rows
    num_columns = pl.cdiv(width, tiles.columns)
    body = partial(
        _product_kernel,
        tiles=tiles,
        num_blocks=num_blocks,
        num_columns=num_columns,
        num_experts=num_experts,
        is_transposed=is_transposed,
    )
    return pl.pallas_call(
        body,
        out_shape=jax.ShapeDtypeStruct((total, width), rows.dtype),
        grid=(num_blocks * num_columns,),
        interpret=tiling.interpret,
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        name="grouped_matmul",
    )(rows, kernel, group, row_of.astype("int32"), ends[group])


def _product_kernel(
    rows: Any,
    kernel: Any,
    group_of: Any,
    row_of: Any,
    end_of: Any,
    outputs: Any,
    *,
    tiles: Tiles,
    num_blocks: int,
    num_columns: int,
    num_experts: int,
    is_transposed: bool,
) -> None:
    block, column = _block_and_column(num_blocks, num_columns)
    at, end, group = row_of[block], end_of[block], group_of[block]
    depth, width = rows.shape[1], outputs.shape[1]

    @pl.when(at < end)
    def _() -> None:
        here, columns = pl.ds(at, tiles.rows), pl.ds(column * tiles.columns, tiles.columns)
        is_row = (at + jnp.arange(tiles.rows) < end)[:, None]
        is_column = column * tiles.columns + jnp.arange(tiles.columns) < width
        expert = jnp.minimum(group, num_experts - 1)

        def step(index: Any, sums: Tensor) -> Tensor:
            part = pl.ds(index * tiles.depth, tiles.depth)
            is_part = index * tiles.depth + jnp.arange(tiles.depth) < depth
            in_depth = partial(_unless_whole, is_part, depth, tiles.depth)
            in_width = partial(_unless_whole, is_column, width, tiles.columns)
            left = _load(rows.at[here, part], is_row, in_depth(axis=1))
            if is_transposed:
                right = _load(kernel.at[expert, columns, part], in_width(axis=0), in_depth(axis=1))
            else:
                right = _load(kernel.at[expert, part, columns], in_depth(axis=0), in_width(axis=1))
            return sums + _dot(left, right, 1, 1 if is_transposed else 0)

        sums = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
        sums = lax.fori_loop(0, pl.cdiv(depth, tiles.depth), step, sums)
        sums = jnp.where(group < num_experts, sums, 0.0)
        mask = jnp.logical_and(is_row, is_column[None, :])
        triton.store(outputs.at[here, columns], sums.astype(outputs.dtype), mask=mask)


def _block_and_column(num_blocks: int, num_columns: int) -> tuple[Any, Any]:
    """This program's block of rows and of columns: neighbours share what they read."""
    program = pl.program_id(0)
    per_group = _GROUP * num_columns
    first = program // per_group * _GROUP
    size = jnp.minimum(num_blocks - first, _GROUP)
    within = program % per_group
    return first + within % size, within // size


@partial(jax.jit, static_argnums=0)
def _run_by_kernels(tiling: Tiling, rows: Tensor, upstream: Tensor, ends: Tensor) -> Tensor:
    tiles = tiling.of_kernels
    height, width, num_experts = rows.shape[1], upstream.shape[1], ends.shape[0]
    grid = (num_experts * pl.cdiv(height, tiles.rows) * pl.cdiv(width, tiles.columns),)
    return pl.pallas_call(
        partial(_by_kernels_kernel, tiles=tiles),
        out_shape=jax.ShapeDtypeStruct((num_experts, height, width), rows.dtype),
        grid=grid,
        interpret=tiling.interpret,
        compiler_params=triton.CompilerParams(num_warps=tiles.warps, num_stages=tiles.stages),
        name="grouped_matmul_by_kernels",
    )(rows, upstream, _starts(ends), ends)


def _by_kernels_kernel(
    rows: Any, upstream: Any, starts: Any, ends: Any, outputs: Any, *, tiles: Tiles
) -> None:
    _, height, width = outputs.shape
    downward, across = pl.cdiv(height, tiles.rows), pl.cdiv(width, tiles.columns)
    program = pl.program_id(0)
    expert = program // (downward * across)
    within = program % (downward * across)
    top, left = within % downward * tiles.rows, within // downward * tiles.columns
    start, end = starts[expert], ends[expert]
    is_top = top + jnp.arange(tiles.rows) < height
    is_left = left + jnp.arange(tiles.columns) < width
    in_top = _unless_whole(is_top, height, tiles.rows, axis=1)
    in_left = _unless_whole(is_left, width, tiles.columns, axis=1)

    def step(index: Any, sums: Tensor) -> Tensor:
        at = start + index * tiles.depth
        here = pl.ds(at, tiles.depth)
        is_row = (at + jnp.arange(tiles.depth) < end)[:, None]
        first = _load(rows.at[here, pl.ds(top, tiles.rows)], is_row, in_top)
        second = _load(upstream.at[here, pl.ds(left, tiles.columns)], is_row, in_left)
        return sums + _dot(first, second, 0, 0)

    sums = jnp.zeros((tiles.rows, tiles.columns), jnp.float32)
    sums = lax.fori_loop(0, (end - start + tiles.depth - 1) // tiles.depth, step, sums)
    target = outputs.at[expert, pl.ds(top, tiles.rows), pl.ds(left, tiles.columns)]
    mask = jnp.logical_and(is_top[:, None], is_left[None, :])
    triton.store(target, sums.astype(outputs.dtype), mask=mask)


def _starts(ends: Tensor) -> Tensor:
    return jnp.concatenate([jnp.zeros_like(ends[:1]), ends[:-1]])


def _unless_whole(mask: Tensor, size: int, block: int, axis: int) -> Tensor | None:
    """The mask along one of two axes, or None where blocks fill the dimension."""
    return None if size % block == 0 else jnp.expand_dims(mask, 1 - axis)


def _load(where: Any, *masks: Tensor | None) -> Tensor:
    """Reads a block; what a mask leaves out is 0."""
    masks = tuple(mask for mask in masks if mask is not None)
    if not masks:
        return triton.load(where)
    mask = masks[0] if len(masks) == 1 else jnp.logical_and(*masks)
    return triton.load(where, mask=mask, other=0)


def _dot(left: Tensor, right: Tensor, left_axis: int, right_axis: int) -> Tensor:
    """The product of two blocks, summed over these axes in float32."""
    axes = (((left_axis,), (right_axis,)), ((), ()))
    return lax.dot_general(left, right, axes, preferred_element_type=jnp.float32)
