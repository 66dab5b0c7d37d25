"""Images as pictures draw them, and the grids of their patches."""

import math
from collections.abc import Sequence

import numpy as np

from keras_moe.core import checks
from keras_moe.core.types import Array, Data


def pictures_of(images: Data, pictures: Array | None) -> Array:
    """The pictures to show, `(n, height, width, 3)` between 0 and 1: those given, or the inputs.

    Raises:
        ValueError: where there are none.
    """
    if pictures is None and not hasattr(images, "shape"):
        checks.fail(
            "`pictures` must be given where the model's inputs are not one array of images.",
            pictures=None,
        )
    shown = np.asarray(images if pictures is None else pictures, dtype=np.float64)
    if shown.ndim == 3:
        shown = shown[..., None]
    if shown.ndim != 4 or shown.shape[-1] not in (1, 3) or not shown.size:
        checks.fail(
            "`pictures` must be images of 1 or 3 channels, (n, height, width, channels), where the "
            "model's inputs are none.",
            shape=shown.shape,
        )
    low, high = shown.min(), shown.max()
    shown = (shown - low) / max(high - low, 1e-12)
    return np.broadcast_to(shown, (*shown.shape[:3], 3))


def check_one_per_image(count: int, pictures: Array, titles: Sequence[str] | None) -> None:
    """Fails where there is not one picture, and one title, for each image."""
    if len(pictures) != count or (titles is not None and len(titles) != count):
        checks.fail(
            f"`pictures` and `titles` must have one entry for each of {count} images.",
            pictures=len(pictures),
            titles=None if titles is None else len(titles),
        )


def on_grid(weights: Array, grid: tuple[int, int] | None, size: tuple[int, int]) -> Array:
    """The weights of the patches, `(n, rows, columns, E)`."""
    if grid is None and weights.ndim == 4:  # the layer's inputs were a grid
        return weights
    weights = weights.reshape(len(weights), -1, weights.shape[-1])
    tokens = weights.shape[1]
    rows, columns = grid or _grid_like(tokens, size)
    if not 0 < rows * columns <= tokens:
        checks.fail(
            f"`patch_grid` must be rows and columns of at most the {tokens} tokens.",
            patch_grid=grid,
        )
    return weights[:, tokens - rows * columns :].reshape(len(weights), rows, columns, -1)


def fits_grid(weights: Array, grid: tuple[int, int] | None, images: Data) -> bool:
    """Whether weights `(n, ..., E)` are those of the patches of images that can be shown."""
    shape = tuple(getattr(images, "shape", ()))
    if len(shape) not in (3, 4) or (len(shape) == 4 and shape[-1] not in (1, 3)):
        return False
    if weights.ndim < 3 or len(weights) != shape[0]:
        return False
    if grid is None and weights.ndim == 4:
        return True
    tokens = int(np.prod(weights.shape[1:-1]))
    rows, columns = grid or _grid_like(tokens, (shape[1], shape[2]))
    return 0 < rows * columns <= tokens


def _grid_like(tokens: int, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns in the proportion of the image, (0, 0) where tokens do not fill them."""
    rows = round(math.sqrt(tokens * size[0] / size[1]))
    columns = tokens // max(rows, 1)
    is_full = rows * columns == tokens and rows * size[1] == columns * size[0]
    return (rows, columns) if is_full else (0, 0)


def on_pixels(of_patches: Array, height: int, width: int) -> Array:
    """Repeats what a patch has, `(rows, columns, ...)`, over its pixels."""
    rows, columns = of_patches.shape[:2]
    down, across = np.arange(height) * rows // height, np.arange(width) * columns // width
    return of_patches[down][:, across]
