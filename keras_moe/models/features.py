"""Features of a ranker, such as the user, the item and the time: one record per input.

Each record makes its `keras.Input` and turns it into a vector per example. A record of your own, a
subclass of `Feature`, joins the others by the same three methods.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import keras
import numpy as np
from keras import layers

from keras_moe.core import checks
from keras_moe.core.initializers import derived_seed
from keras_moe.core.types import Tensor
from keras_moe.models.history_mean import HistoryMean
from keras_moe.models.masked_embedding import MaskedEmbedding


@dataclasses.dataclass(frozen=True)
class Feature:
    """A named input of a model, and the vector that the model makes of it.

    Args:
        name: Name of the input, the key in the dict that the model is called with: letters from a
            to z, digits, `_` and `-`.
    """

    name: str

    def __post_init__(self) -> None:
        checks.layer_name("name", self.name)

    def _set_size(self, name: str) -> None:
        """Checks a size and keeps it as an `int`: Keras's layers refuse NumPy's integers."""
        object.__setattr__(self, name, checks.positive_int(name, getattr(self, name)))

    @property
    def is_regularized(self) -> bool:
        """Whether the model's dropout of embeddings applies to the vector."""
        return False

    def input(self) -> Tensor:
        """Returns the `keras.Input` of this name."""
        raise NotImplementedError(f"{type(self).__name__} must implement `input`.")

    def encode(
        self, inputs: Tensor, tables: Mapping[str, layers.Embedding], seed: int | None
    ) -> Tensor:
        """Returns the vectors `(batch, width)` of the input, with layers named after it.

        `tables` are the embeddings of the model's `Categorical` features by name.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `encode`.")


@dataclasses.dataclass(frozen=True)
class Categorical(Feature):
    """One id of a known number, such as the user, the item or the country: an embedding.

    Input: int32 `(batch,)`, 0 to size - 1. Strings, hashing and unknown ids are the caller's: map
    them with `keras.layers.StringLookup` or `Hashing` in the input pipeline, or with a dict, and
    leave a row for ids that training has not seen. An id out of range is not noticed on JAX.

    Args:
        name: Name of the input, the key in the dict that the model is called with.
        size: Positive integer, the ids. Where a `History` uses the table, row 0 is its padding,
            and no id of its own.
        dim: Positive integer, the width of the vectors. Defaults to `8`.
        regularized: Whether the model's `embedding_l2` and `dropout` apply to the vectors. A table
            of few rows, such as weekdays, needs neither. Defaults to `True`.
    """

    size: int
    dim: int = 8
    regularized: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_size("size")
        self._set_size("dim")

    @property
    def is_regularized(self) -> bool:
        return self.regularized

    def input(self) -> Tensor:
        return keras.Input((), dtype="int32", name=self.name)

    def table(self, l2: float, seed: int | None) -> layers.Embedding:
        """Returns the embedding, which histories share."""
        name = f"{self.name}_embedding"
        has_penalty = self.regularized and l2 > 0
        return MaskedEmbedding(
            self.size,
            self.dim,
            embeddings_initializer=keras.initializers.RandomUniform(seed=derived_seed(seed, name)),
            embeddings_regularizer=keras.regularizers.L2(l2) if has_penalty else None,
            name=name,
        )

    def encode(
        self, inputs: Tensor, tables: Mapping[str, layers.Embedding], seed: int | None
    ) -> Tensor:
        return tables[self.name](inputs)


@dataclasses.dataclass(frozen=True)
class History(Feature):
    """The last ids of another feature, such as the movies watched: the mean of their vectors.

    Input: int32 `(batch, length)` in any order, 0 where there is none. Zeros count for nothing, and
    a history of zeros gives the zero vector; a mask of that shape leaves out more. The vectors are
    those of the feature `of`, which is regularized, or not, for both.

    Args:
        name: Name of the input, the key in the dict that the model is called with.
        length: Positive integer, the ids per example.
        of: Name of the `Categorical` feature whose table is used.
    """

    length: int
    of: str

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_size("length")

    @property
    def is_regularized(self) -> bool:
        return True

    def input(self) -> Tensor:
        return keras.Input((self.length,), dtype="int32", name=self.name)

    def encode(
        self, inputs: Tensor, tables: Mapping[str, layers.Embedding], seed: int | None
    ) -> Tensor:
        return HistoryMean(name=f"{self.name}_mean")([tables[self.of](inputs), inputs])


@dataclasses.dataclass(frozen=True)
class MultiHot(Feature):
    """A set of labels, such as genres or tags, as one number per label: the sum of their vectors.

    Input: float `(batch, size)`, 1 for a label that holds, 0 for one that does not, or weights.

    Args:
        name: Name of the input, the key in the dict that the model is called with.
        size: Positive integer, the labels.
        dim: Positive integer, the width of the vectors. Defaults to `8`.
    """

    size: int
    dim: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_size("size")
        self._set_size("dim")

    def input(self) -> Tensor:
        return keras.Input((self.size,), name=self.name)

    def encode(
        self, inputs: Tensor, tables: Mapping[str, layers.Embedding], seed: int | None
    ) -> Tensor:
        name = f"{self.name}_embedding"
        initializer = keras.initializers.GlorotUniform(seed=derived_seed(seed, name))
        return layers.Dense(self.dim, use_bias=False, kernel_initializer=initializer, name=name)(
            inputs
        )


@dataclasses.dataclass(frozen=True)
class Numeric(Feature):
    """Numbers, such as counts, prices and times: standardised where mean and variance are given.

    Input: float `(batch, size)`, finite. Take logarithms of counts before.

    Args:
        name: Name of the input, the key in the dict that the model is called with.
        size: Positive integer, the numbers per example. Defaults to `1`.
        mean: Number or `size` of them, the mean of the training examples; None to use the numbers
            as they are. Defaults to `None`.
        variance: Number or `size` of them, their variance; a number that is constant, of variance
            0, is only moved by its mean. Defaults to `None`.
    """

    size: int = 1
    mean: Any = None
    variance: Any = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._set_size("size")
        if (self.mean is None) != (self.variance is None):
            checks.fail(
                "`mean` and `variance` must be given both or neither.",
                mean=self.mean,
                variance=self.variance,
            )
        for name in ("mean", "variance"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, self._statistic(name, getattr(self, name)))

    def _statistic(self, name: str, value: Any) -> tuple[float, ...]:
        numbers = np.asarray(value, "float64")
        is_wrong = numbers.shape not in ((), (self.size,)) or not np.isfinite(numbers).all()
        if is_wrong or (name == "variance" and (numbers < 0).any()):
            kind = "finite numbers" if name == "mean" else "finite numbers of at least 0"
            checks.fail(f"`{name}` must be {kind}, one or size={self.size}.", **{name: value})
        return tuple(np.broadcast_to(numbers, (self.size,)).tolist())

    def input(self) -> Tensor:
        return keras.Input((self.size,), name=self.name)

    def encode(
        self, inputs: Tensor, tables: Mapping[str, layers.Embedding], seed: int | None
    ) -> Tensor:
        if self.mean is None or self.variance is None:
            return inputs
        return layers.Normalization(
            mean=self.mean,
            # Keras divides by 1e-7 at least: a number that was constant in training and is not in
            # serving would come out a million times too large.
            variance=[variance or 1.0 for variance in self.variance],
            dtype="float32",  # raw times and counts overflow float16
            name=f"{self.name}_standardized",
        )(inputs)
