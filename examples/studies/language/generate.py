"""Text that a model goes on with, byte by byte."""

from __future__ import annotations

import keras
import numpy as np


def generate(
    model: keras.Model,
    prompt: bytes,
    count: int,
    context: int,
    temperature: float = 0.8,
    seed: int = 0,
) -> bytes:
    """Return `count` bytes that follow the prompt.

    The window is always `context` bytes, what is not written yet being 0: the model is causal, so
    what stands behind a byte does not matter, and one shape is compiled once.

    Args:
        model: From bytes `(batch, n)` to logits of the next ones.
        prompt: At least one byte.
        count: Bytes to write.
        context: Bytes that the model reads at most.
        temperature: What the logits are divided by; 0 takes the likeliest byte each time.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    written = list(prompt)
    for _ in range(count):
        window = written[-context:]
        tokens = np.zeros((1, context), "int32")
        tokens[0, : len(window)] = window
        logits = model.predict_on_batch(tokens)[0, len(window) - 1].astype("float64")
        if temperature:
            # Gumbel's trick: the largest of logits and such noise is a draw of their softmax.
            logits = logits / temperature + rng.gumbel(size=logits.shape)
        written.append(int(logits.argmax()))
    return bytes(written[len(prompt) :])


def characters(tokens: np.ndarray) -> list[str]:
    """Return a text for each byte: the character of UTF-8 on its first byte, … on the others."""
    data = np.asarray(tokens).reshape(-1).astype("uint8").tobytes()
    shown = []
    for place, byte in enumerate(data):
        length = 1 + sum(byte >= least for least in (0xC0, 0xE0, 0xF0))
        is_first = byte < 0x80 or byte >= 0xC0
        character = data[place : place + length].decode(errors="replace")[:1]
        shown.append(character if is_first else "…")
    return shown
