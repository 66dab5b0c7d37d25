"""The images: digits of scikit-learn, or a dataset of `keras.datasets`, split three ways."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import keras
import numpy as np

# Sizes of the held-out parts are multiples of it: every batch has one shape, compiled once.
EVALUATION_BATCH = 250
SMALL = "digits"  # comes with scikit-learn, so it needs no network

_TEN = tuple("0123456789")
_CLOTHES = (
    "T-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "boot",
)
_CIFAR10 = (
    "airplane",
    "car",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


class DataError(Exception):
    """The data cannot be had; the message says what to do."""


@dataclass(frozen=True)
class Recipe:
    """What depends on the dataset: how images are cut, changed in training, and for how long."""

    patch_size: int
    batch_size: int
    steps_per_epoch: int
    class_names: tuple[str, ...]
    flips: bool = False  # mirrored digits are no digits
    shift: int = 0  # pixels, at most
    validation: int = 2500


RECIPES = {
    "digits": Recipe(2, 64, 30, _TEN, shift=1, validation=250),
    "fashion_mnist": Recipe(7, 128, 60, _CLOTHES, flips=True),
    "mnist": Recipe(7, 128, 60, _TEN, shift=2),
    "cifar10": Recipe(4, 128, 200, _CIFAR10, flips=True, shift=3),
    "cifar100": Recipe(4, 128, 200, tuple(map(str, range(100))), flips=True, shift=3),
}

Arrays = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Images:
    """Pixels from 0 to 255, `(n, height, width, channels)`, and labels `(n,)`, in three parts."""

    name: str
    train: Arrays = field(repr=False)
    validation: Arrays = field(repr=False)
    test: Arrays = field(repr=False)

    @property
    def recipe(self) -> Recipe:
        return RECIPES[self.name]

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.test[0].shape[1:]


def load_images(name: str, say: Callable[[str], None] = print) -> Images:
    """Load a dataset, or digits where that fails.

    Args:
        name: One of `RECIPES`.
        say: Called with a sentence where another dataset is used than the one asked for.

    Raises:
        DataError: where digits cannot be loaded either.
    """
    if name != SMALL:
        try:
            (x, y), test = getattr(keras.datasets, name).load_data()
        # `load_data` raises a plain Exception when a download fails, others on broken files.
        except Exception as error:
            home = os.environ.get("KERAS_HOME", os.path.join("~", ".keras"))
            say(
                f"{name} could not be loaded: {type(error).__name__}: {error}. Going on with "
                f"{SMALL}, 1,797 images of 8 x 8 pixels that come with scikit-learn. To have "
                f"{name}: run this once with a network, or put its files into {home}/datasets "
                "(the environment variable KERAS_HOME names another folder)."
            )
            name = SMALL
        else:
            return _split(name, _uniform(x, y), _uniform(*test))
    x, y = _uniform(*_load_digits())
    return _split(name, (x[500:], y[500:]), (x[:500], y[:500]))


def _load_digits() -> Arrays:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise DataError(
            f"{SMALL} come with scikit-learn, which cannot be imported ({error}): "
            'pip install "keras-moe[examples]"'
        ) from error
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    return np.round(digits.images * (255 / 16)).astype("uint8")[order], digits.target[order]


def _uniform(x: np.ndarray, y: np.ndarray) -> Arrays:
    """Give images a channel axis and labels none."""
    return x.reshape(*x.shape[:3], -1), y.reshape(-1).astype("int32")


def _split(name: str, rest: Arrays, test: Arrays) -> Images:
    """Take the validation part out of the training images, at random, the same for all seeds."""
    x, y = rest
    order = np.random.default_rng(1).permutation(len(x))
    held, kept = np.split(order, [RECIPES[name].validation])
    return Images(name, train=(x[kept], y[kept]), validation=(x[held], y[held]), test=test)


def training_batches(
    images: Images, batch_size: int, seed: int, first_step: int = 0
) -> Iterator[Arrays]:
    """Yield batches without end; the same seed and step always give the same batch.

    The last images of a pass, too few for a batch, wait for the next one.
    """
    x, y = images.train
    in_a_pass = len(x) // batch_size
    number, begin = divmod(first_step, in_a_pass)
    while True:
        order = np.random.default_rng([seed, number]).permutation(len(x))
        for place in range(begin, in_a_pass):
            rows = order[place * batch_size : (place + 1) * batch_size]
            yield x[rows].astype("float32"), y[rows]
        number, begin = number + 1, 0
