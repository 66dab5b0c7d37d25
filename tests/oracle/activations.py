"""Activations with their derivatives: each function returns (value, derivative)."""

import math

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])


def linear(x):
    return x, np.ones_like(x)


def relu(x):
    return np.maximum(x, 0.0), (x > 0).astype(np.float64)


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def silu(x):
    s = sigmoid(x)
    return x * s, s + x * s * (1.0 - s)


def gelu(x):
    """x Phi(x), Phi the standard normal distribution function."""
    cdf = 0.5 * (1.0 + _erf(x / math.sqrt(2.0)))
    pdf = np.exp(-0.5 * x * x) / math.sqrt(2.0 * math.pi)
    return x * cdf, cdf + x * pdf


def gelu_tanh(x):
    """0.5 x (1 + tanh(c (x + 0.044715 x^3))), c = sqrt(2 / pi)."""
    c = math.sqrt(2.0 / math.pi)
    t = np.tanh(c * (x + 0.044715 * x**3))
    slope = c * (1.0 + 3 * 0.044715 * x * x)
    return 0.5 * x * (1.0 + t), 0.5 * (1.0 + t) + 0.5 * x * (1.0 - t * t) * slope


BY_NAME = {
    "linear": linear,
    "relu": relu,
    "silu": silu,
    "gelu": gelu,
    "gelu_tanh": gelu_tanh,
}
