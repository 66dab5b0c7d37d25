"""Rows of the table, with their sizes and our targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

FORWARD, GRADIENT = "forward", "gradient"
PASSES = (FORWARD, GRADIENT)
_QUICK_TOKENS, _QUICK_EXPERTS = 64, 4


class Sizes(NamedTuple):
    """The sizes of one mixture: T tokens of width d, E experts of hidden width h, k per token."""

    tokens: int
    width: int
    hidden: int
    experts: int
    top_k: int

    @property
    def label(self) -> str:
        """The row's name in the table."""
        return ", ".join(str(size) for size in self)

    def quick(self) -> Sizes:
        """Sizes that run in milliseconds: they show that a row works, and nothing else."""
        experts = min(self.experts, _QUICK_EXPERTS)
        return Sizes(min(self.tokens, _QUICK_TOKENS), 16, 32, experts, min(self.top_k, 2))


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table.

    Attributes:
        name: unique, what `--rows` takes.
        group: what `--rows` takes for all rows of its kind.
        title: what is measured and against what, for a reader.
        kind: the key in `benchmarks.kinds.KINDS` of what builds it.
        sizes: the mixture's sizes.
        limits: by pass, the ratio we want to stay under.
        capacity_factor: of our layer; None drops nothing.
        dtype: where the row fixes it.
    """

    name: str
    group: str
    title: str
    kind: str
    sizes: Sizes
    limits: Mapping[str, float]
    capacity_factor: float | None = None
    dtype: str | None = None

    def quick(self) -> Row:
        """The same row in tiny sizes."""
        return dataclasses.replace(self, sizes=self.sizes.quick())


def _rows(
    group: str,
    title: str,
    kind: str,
    sizes: Iterable[tuple[int, int, int, int, int]],
    forward: float | None = None,
    gradient: float | None = None,
    **more: object,
) -> list[Row]:
    """One row for each of `sizes`, all with the same targets."""
    limits = {FORWARD: forward, GRADIENT: gradient}
    known = {which: limit for which, limit in limits.items() if limit is not None}
    return [
        Row("-".join([group, *map(str, row)]), group, title, kind, Sizes(*row), known, **more)
        for row in sizes
    ]


# DeepSeek's and OLMoE's, Mixtral's, Qwen3's, and Qwen3's while it writes 64 texts.
_LANGUAGE_MODELS = [
    (32768, 2048, 1408, 64, 8),
    (16384, 4096, 14336, 8, 2),
    (32768, 2048, 768, 128, 8),
    (64, 2048, 768, 128, 8),
]

ROWS: tuple[Row, ...] = (
    *_rows(
        "dropless",
        "MoE, dropless, N/E >= 512 / dense FFN",
        "feed_forward",
        [(8192, 256, 1024, 8, 2), (8192, 512, 2048, 16, 2)],
        1.10,
        1.15,
    ),
    *_rows(
        "many-experts",
        "MoE, dropless, N/E < 512 / dense FFN",
        "feed_forward",
        [(2048, 256, 1024, 32, 2), (8192, 512, 2048, 64, 2)],
        1.25,
        1.4,
    ),
    *_rows(
        "fine-grained",
        "MoE, dropless, fine-grained / dense FFN",
        "feed_forward",
        [(2048, 512, 256, 64, 8), (4096, 512, 256, 128, 8)],
        1.5,
        1.7,
    ),
    *_rows(
        "recommender",
        "MoE, dropless, small / dense FFN",
        "feed_forward",
        [(4096, 128, 64, 8, 2)],
        1.5,
        1.7,
    ),
    *_rows(
        "capacity",
        "MoE, capacity factor 1.0 / dense FFN",
        "feed_forward",
        [(8192, 256, 1024, 8, 2), (2048, 256, 1024, 32, 2)],
        1.10,
        1.15,
        capacity_factor=1.0,
    ),
    *_rows(
        "decode",
        "MoE, a few tokens / reading the chosen weights once",
        "decode",
        [(1, 256, 1024, 64, 2), (8, 256, 1024, 64, 2), (64, 256, 1024, 64, 2)],
        1.5,
    ),
    *_rows(
        "skew",
        "MoE, Zipf routing / the same layer, even routing",
        "skew",
        [(8192, 256, 1024, 8, 2), (2048, 256, 1024, 32, 2), (2048, 512, 256, 64, 8)],
        1.15,
        1.15,
    ),
    *_rows(
        "experts",
        "MoE, E experts / MoE, 8 experts",
        "more_experts",
        [(8192, 256, 1024, 128, 2)],
        1.25,
        1.25,
    ),
    *_rows(
        "tokens",
        "MoE, T tokens / MoE, T/2 tokens",
        "more_tokens",
        [(8192, 256, 1024, 32, 2)],
        2.1,
        2.1,
    ),
    *_rows(
        "memory",
        "MoE, peak memory of a training step / dense FFN",
        "memory",
        [(8192, 256, 1024, 8, 2), (2048, 256, 1024, 32, 2), (2048, 512, 256, 64, 8)],
        gradient=1.3,
    ),
    *_rows(
        "compile",
        "MoE, time to compile, E experts / 8 experts",
        "compile",
        [(2048, 256, 1024, 64, 2)],
        gradient=1.5,
    ),
    # In the MMoE row, h is the first expert layer's width and k the number of tasks: see its kind.
    *_rows("mmoe", "MMoE", "mmoe", [(4096, 128, 256, 8, 4)]),
    *_rows(
        "soft",
        "SoftMoE, as many slots as tokens / dense FFN",
        "soft",
        [(2048, 256, 1024, 64, 1)],
        1.25,
        1.25,
    ),
    *_rows(
        "curve",
        "MoE, dropless, by number of experts / dense FFN",
        "feed_forward",
        [(2048, 256, 1024, experts, 2) for experts in (4, 8, 16, 32, 64, 128)],
    ),
    *_rows(
        "parts",
        "MoE, dropless, by parts / dense FFN",
        "parts",
        [
            (8192, 256, 1024, 8, 2),
            (2048, 256, 1024, 32, 2),
            (2048, 512, 256, 64, 8),
            (4096, 128, 64, 8, 2),
        ],
    ),
    *_rows(
        "gpu",
        "MoE, dropless, sizes of language models / dense FFN, or batched products",
        "accelerator",
        _LANGUAGE_MODELS,
        dtype="bfloat16",
    ),
    *_rows(
        "gpu-mixed",
        "MoE, dropless, weights in float32 / dense FFN, or batched products",
        "accelerator",
        [_LANGUAGE_MODELS[2], _LANGUAGE_MODELS[3]],
        dtype="mixed_bfloat16",
    ),
)
ON_REQUEST = frozenset({"gpu", "gpu-mixed"})  # groups that run only when named


def select(asked: Iterable[str] | None) -> list[Row]:
    """The rows whose name or group is asked for, in the table's order; None for the default ones.

    Raises:
        ValueError: on a word that names no row and no group.
    """
    if asked is None:
        return [row for row in ROWS if row.group not in ON_REQUEST]
    words = list(dict.fromkeys(asked))
    groups = list(dict.fromkeys(row.group for row in ROWS))
    known = {*groups, *(row.name for row in ROWS)}
    unknown = [word for word in words if word not in known]
    if unknown:
        raise ValueError(
            f"Unknown rows: {unknown}. Name groups, {groups}, or single rows, as "
            f"{ROWS[0].name!r}; `--list` prints them all."
        )
    return [row for row in ROWS if row.name in words or row.group in words]
