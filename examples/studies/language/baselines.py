"""What the held-out text costs without a network, for scale."""

from __future__ import annotations

import lzma

import numpy as np

from language.data import VOCABULARY, Text

_UNSEEN = 0.05  # added to each pair's count, or an unseen one would cost infinitely much


def bits_of_pairs(text: Text) -> float:
    """Return the bits per byte of a table of which byte follows which, from the training text."""
    counts = np.full((VOCABULARY, VOCABULARY), _UNSEEN)
    np.add.at(counts, (text.train[:-1], text.train[1:]), 1)
    chance = counts / counts.sum(1, keepdims=True)
    return float(-np.log2(chance[text.held_out[:-1], text.held_out[1:]]).mean())


def bits_of_xz(text: Text) -> float:
    """Return by how many bits per byte a compressed training text grows with the held-out one."""
    train, held_out = text.train.tobytes(), text.held_out.tobytes()
    before, after = (len(lzma.compress(each, preset=9)) for each in (train, train + held_out))
    return 8 * (after - before) / len(held_out)
