"""Fixed routing by token id: hash layers."""

import heapq
import random
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_moe.core import checks
from keras_moe.core.initializers import derived_seed
from keras_moe.core.types import Config, Shape, Tensor
from keras_moe.routers.base import Decision
from keras_moe.routers.fixed import FixedRouter

Table = np.ndarray[Any, np.dtype[np.int32]]


@keras.saving.register_keras_serializable(package="keras_moe")
class TokenHashRouter(FixedRouter):
    """Sends each token to the k experts that a table has for its id, each with weight 1 / k.

    experts = table[id mod V]. The table `(V, k)` is drawn at random once, never trained, and saved;
    `balance` fills it by the frequencies of the ids instead. The layer must be called with
    `token_ids`.

    Args:
        num_experts: Positive integer, the number of experts E.
        vocabulary_size: Positive integer, the number of ids V.
        top_k: Integer between 1 and `num_experts`. Defaults to `1` (the paper's).
        seed: Optional integer from which the table is drawn, the same one on every backend.
            Defaults to `None`.

    Example:

    >>> import keras, numpy as np
    >>> from keras_moe import layers, routers
    >>> ids = keras.Input((None,), dtype="int32")
    >>> x = keras.layers.Embedding(1000, 16)(ids)
    >>> layer = layers.MoE(8, 64, router=routers.TokenHashRouter(8, vocabulary_size=1000))
    >>> model = keras.Model(ids, layer(x, token_ids=ids))
    >>> tuple(model(np.array([[1, 2, 3]])).shape)
    (1, 3, 16)

    Reference:
        Roller et al. 2021, "Hash Layers For Large Sparse Models", section 3 (random hash, balanced
        assignment).
    """

    fixes_top_k = True
    needs_token_ids = True

    def __init__(
        self,
        num_experts: int,
        vocabulary_size: int,
        top_k: int = 1,
        *,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(num_experts, top_k, seed=seed, **kwargs)
        self.vocabulary_size = checks.positive_int("vocabulary_size", vocabulary_size)

    def build(self, input_shape: Shape) -> None:
        self.table = self.add_weight(
            name="table",
            shape=(self.vocabulary_size, self.top_k),
            initializer=self._random_table,
            dtype="int32",
            trainable=False,
            autocast=False,
        )

    def _random_table(self, shape: Any, dtype: Any = None) -> Tensor:
        seed = derived_seed(self.seed, "router/table")
        # As Keras draws a seed where none is given, so that `set_random_seed` fixes it.
        rng = np.random.default_rng(random.randint(0, 2**31 - 1) if seed is None else seed)
        table = np.zeros(shape, "int32")
        for choice in range(self.top_k):
            drawn = rng.integers(self.num_experts - choice, size=shape[0])
            # Counted among the experts that a row does not have yet.
            for taken in np.sort(table[:, :choice], axis=1).T:
                drawn += drawn >= taken
            table[:, choice] = drawn
        return ops.convert_to_tensor(table, dtype=dtype)

    def balance(self, frequencies: Any) -> None:
        """Fills the table so that all experts get about as many tokens.

        The most frequent id first, each goes to the k experts that have got the least so far.

        Args:
            frequencies: Numbers of at least 0 `(V,)`, how often each id occurs in the data.
        """
        amounts = np.asarray(frequencies, dtype="float64")
        if amounts.shape != (self.vocabulary_size,) or not (amounts >= 0).all():
            checks.fail(
                "`frequencies` must be numbers of at least 0, one per id, of shape "
                f"({self.vocabulary_size},).",
                shape=amounts.shape,
            )
        self.table.assign(_balanced_table(amounts, self.num_experts, self.top_k))

    def decide(
        self,
        inputs: Tensor,
        mask: Tensor | None,
        training: bool | None,
        token_ids: Tensor | None = None,
    ) -> Decision:
        if token_ids is None:
            checks.fail("`TokenHashRouter` needs `token_ids`.", token_ids=None)
        rows = ops.mod(ops.cast(token_ids, "int32"), self.vocabulary_size)
        experts = ops.take(ops.convert_to_tensor(self.table), rows, axis=0)
        logits = ops.zeros((ops.shape(inputs)[0], self.num_experts), dtype="float32")
        return self._decision(experts, logits)

    def get_config(self) -> Config:
        return {**super().get_config(), "vocabulary_size": self.vocabulary_size}


def _balanced_table(frequencies: np.ndarray[Any, Any], num_experts: int, top_k: int) -> Table:
    """The k emptiest experts for each id, the most frequent one first; int32 `(V, k)`."""
    table = np.zeros((len(frequencies), top_k), "int32")
    order = np.argsort(-frequencies, kind="stable")
    occurs = frequencies[order] > 0
    # Ids that do not occur weigh nothing, and would all go to one expert: they are spread apart.
    for rows, weigh in ((order[occurs], frequencies), (order[~occurs], np.ones_like(frequencies))):
        load = [(0.0, expert) for expert in range(num_experts)]
        for row in rows:
            emptiest = [heapq.heappop(load) for _ in range(top_k)]
            table[row] = [expert for _, expert in emptiest]
            for amount, expert in emptiest:
                heapq.heappush(load, (amount + float(weigh[row]), expert))
    return table
