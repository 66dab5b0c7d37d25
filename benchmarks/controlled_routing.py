"""Inputs whose routing is known: every layer that is compared sends the same tokens to the same
experts.

The first E features of a token are the scores of the E experts, and the router's kernel copies
them: logits = log(share of the expert) + Gumbel noise. The k largest of such scores are k draws
without replacement with those shares (the Gumbel top-k trick). The router itself runs as ever: its
matmul, softmax, choice and losses are all in the time.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from benchmarks.rows import Sizes

ZIPF_EXPONENT = 1.0


def even_shares(num_experts: int) -> np.ndarray:
    """Each expert is as likely as any other."""
    return np.full(num_experts, 1.0 / num_experts)


def zipf_shares(num_experts: int) -> np.ndarray:
    """The expert of rank r is chosen with a probability proportional to 1/r."""
    weights = 1.0 / np.arange(1, num_experts + 1) ** ZIPF_EXPONENT
    return weights / weights.sum()


def routed_inputs(sizes: Sizes, shares: np.ndarray, seed: int = 0) -> np.ndarray:
    """Tokens `(T, d)` that a router with `copying_kernel` sends to experts with these shares."""
    if sizes.experts > sizes.width:
        raise ValueError(
            f"The scores of {sizes.experts} experts do not fit in tokens of width {sizes.width}."
        )
    rng = np.random.default_rng(seed)
    inputs = rng.normal(size=(sizes.tokens, sizes.width))
    noise = rng.gumbel(size=(sizes.tokens, sizes.experts))
    inputs[:, : sizes.experts] = np.log(shares) + noise
    return inputs.astype("float32")


def copying_kernel(width: int, num_experts: int) -> np.ndarray:
    """The router kernel `(d, E)` that takes the first E features as logits."""
    return np.eye(width, num_experts, dtype="float32")


def loads(inputs: np.ndarray, sizes: Sizes) -> np.ndarray:
    """The number of tokens that each expert gets, int `(E,)`."""
    scores = inputs[:, : sizes.experts]
    chosen = np.argpartition(-scores, sizes.top_k - 1, axis=1)[:, : sizes.top_k]
    return np.bincount(chosen.ravel(), minlength=sizes.experts)


def load_facts(inputs: np.ndarray, sizes: Sizes) -> dict[str, Any]:
    """Facts about the loads for the table: how uneven they are, and how many experts are used."""
    counts = loads(inputs, sizes)
    return {
        "load_max_over_mean": float(counts.max() / counts.mean()),
        "experts_used": int((counts > 0).sum()),
    }
