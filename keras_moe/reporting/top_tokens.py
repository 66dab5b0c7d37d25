"""Tokens of a text that are typical of an expert."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from keras_moe.core import checks
from keras_moe.core.types import Array, Data

_MOST = 12


class TopToken(NamedTuple):
    """A token that an expert gets more of than of others.

    Attributes:
        text: the piece of text.
        share: how much of it the expert gets, of all its weight.
    """

    text: str
    share: float


def texts_of(x: Data, texts: Any, vocabulary: Any) -> list[list[str]] | None:
    """The pieces of text of each example: the texts passed in, or a vocabulary's texts for ids.

    Raises:
        ValueError: where there is a vocabulary and no ids of tokens.
    """
    if texts is not None:
        return [[str(piece) for piece in pieces] for pieces in texts]
    if vocabulary is None:
        return None
    ids = _token_ids(x)
    known: Mapping[int, str] = (
        vocabulary if isinstance(vocabulary, Mapping) else dict(enumerate(vocabulary))
    )
    return [[str(known.get(int(token), f"[{token}]")) for token in row] for row in ids]


def _token_ids(x: Data) -> Any:
    arrays = x.values() if isinstance(x, dict) else x if isinstance(x, Sequence) else [x]
    for array in arrays:
        if array.ndim == 2 and np.issubdtype(array.dtype, np.integer):
            return array
    checks.fail(
        "`vocabulary` needs inputs that are ids of tokens, integers (n, T).",
        shapes=[array.shape for array in arrays],
    )


def top_tokens(weights: Array, texts: Sequence[Sequence[str]]) -> list[list[TopToken]] | None:
    """The most typical tokens of each expert, None where the layer decides about other tokens.

    score(t, e) = p(t|e) log(p(t|e) / p(t)), the token's part in how far the expert's tokens are
    from all tokens: high for those that are many and mostly the expert's.

    Args:
        weights: What tokens take of experts, `(n, T, E)`.
        texts: Up to T pieces of text for each of up to n examples.
    """
    if weights.ndim != 3 or max(map(len, texts), default=0) > weights.shape[1]:
        return None
    numbers: dict[str, int] = {}
    rows = [[numbers.setdefault(piece, len(numbers)) for piece in pieces] for pieces in texts]
    taken = np.zeros((len(numbers), weights.shape[-1]))
    for row, of_example in zip(rows, weights, strict=False):
        np.add.at(taken, row, of_example[: len(row)])
    total = taken.sum(axis=1, keepdims=True)
    of_expert = taken / np.maximum(taken.sum(axis=0), 1e-12)
    of_all = total / max(total.sum(), 1e-12)
    ratio = np.where(of_expert > 0, of_expert, 1.0) / np.where(of_expert > 0, of_all, 1.0)
    scores = of_expert * np.log(ratio)
    names = list(numbers)
    return [
        [
            TopToken(names[token], float(taken[token, expert] / total[token, 0]))
            for token in np.argsort(-scores[:, expert], kind="stable")[:_MOST]
            if scores[token, expert] > 0
        ]
        for expert in range(weights.shape[-1])
    ]
