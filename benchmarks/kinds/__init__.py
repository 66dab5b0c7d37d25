"""Kinds of rows, each with a function `case(row, options)`."""

from __future__ import annotations

from benchmarks.contender import Case, Options
from benchmarks.kinds import accelerator, decode, feed_forward, mmoe, parts, skew, soft, variants
from benchmarks.rows import Row

KINDS = {
    "accelerator": accelerator.case,
    "compile": variants.compile_time,
    "decode": decode.case,
    "feed_forward": feed_forward.case,
    "memory": variants.memory,
    "mmoe": mmoe.case,
    "more_experts": variants.more_experts,
    "more_tokens": variants.more_tokens,
    "parts": parts.case,
    "skew": skew.case,
    "soft": soft.case,
}


def build_case(row: Row, options: Options) -> Case:
    """The contenders and comparisons of a row."""
    return KINDS[row.kind](row, options)
