"""Tracing a model for a format that other runtimes read."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_is_on: ContextVar[bool] = ContextVar("keras_moe_exporting", default=False)


@contextmanager
def exporting() -> Iterator[None]:
    """Lets layers compute with operations that export formats have.

    A sparse layer runs its experts in a loop over data-dependent rows, which ONNX, OpenVINO, LiteRT
    and `torch.export` cannot hold. A model that is traced inside this context runs blocks of a
    fixed number of rows in one batched matmul instead, or all experts where they are Keras layers.
    Values are the same, the cost is not: each block copies its expert's weights. A SavedModel of
    TensorFlow or JAX does not need it.

    Returns:
        A context manager.

    Example:

    >>> import keras, keras_moe, numpy as np, pathlib, tempfile
    >>> inputs = keras.Input((6,))
    >>> model = keras.Model(inputs, keras_moe.layers.MoE(4, 8)(inputs))
    >>> with keras_moe.exporting():
    ...     outputs = model(np.ones((3, 6), "float32"))  # or model.export(path, format="onnx")
    >>> tuple(outputs.shape)
    (3, 6)
    """
    token = _is_on.set(True)
    try:
        yield
    finally:
        _is_on.reset(token)


is_exporting = _is_on.get  # whether a call is made inside `exporting()`
