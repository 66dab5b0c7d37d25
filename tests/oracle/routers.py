"""Routers once more, from their papers' equations: who is chosen, with which weight and losses.

Every function takes float64 tokens `(N, d)`, a dict of weights, a mask `(N,)` of bool, and the
standard normal noise of a training step `(N, E)`, or None at inference. Gradients are central
differences: see `gradients`.
"""

import dataclasses
import math

import numpy as np

from tests.oracle import losses
from tests.oracle.moe import capacity_of


@dataclasses.dataclass
class Decision:
    """Arrays `(N, k)`, losses by name before their coefficients, and `(N, E)` what they average."""

    experts: np.ndarray
    weights: np.ndarray
    kept: np.ndarray
    losses: dict
    shares: np.ndarray


def top(scores, k):
    """The k largest of a row, best first, ties to the lowest index."""
    return sorted(range(len(scores)), key=lambda e: (-scores[e], e))[:k]


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def softplus(x):
    return np.log1p(np.exp(x))


def phi(z):
    """The standard normal distribution function."""
    return np.vectorize(lambda each: 0.5 * (1.0 + math.erf(each / math.sqrt(2.0))))(z)


def cv_squared(amounts):
    mean = np.mean(amounts)
    return 0.0 if mean == 0 else np.mean((amounts - mean) ** 2) / mean**2


def decision(chosen, weights, logits, shares, mask, is_chosen=None, **more):
    """Puts a decision together; `shares (N, E)` are what the balance loss averages."""
    chosen, weights = np.array(chosen), np.array(weights)
    kept = np.broadcast_to(mask[:, None], chosen.shape).copy()
    if is_chosen is not None:
        kept &= is_chosen
    count = max(mask.sum(), 1)
    num_experts = logits.shape[1]
    load = np.zeros(num_experts)
    for n, j in zip(*np.nonzero(kept), strict=True):
        load[chosen[n, j]] += 1
    balance = num_experts * np.sum(
        load / (count * chosen.shape[1]) * shares[mask].sum(axis=0) / count
    )
    z_loss, _ = losses.z_loss(logits, mask)
    return Decision(chosen, weights, kept, {"balance": balance, "z_loss": z_loss, **more}, shares)


def with_all_losses(rule, sequences):
    """The rule with the losses that are off unless asked for, over so many sequences."""

    def extended(x, w, mask, noise, **settings):
        result = rule(x, w, mask, noise, **settings)
        more = {
            "sequence_balance": losses.sequence_balance(
                result.shares, result.experts, result.kept, mask, sequences
            ),
            "first_choice_balance": losses.first_choice_balance(
                result.shares, result.experts, result.kept, mask
            ),
            "local_entropy": losses.local_entropy(result.shares, mask),
            "global_entropy": losses.global_entropy(result.shares, mask),
        }
        return dataclasses.replace(result, losses={**result.losses, **more})

    return extended


def with_losses_of_sequences(rule, sequences):
    """The rule with its importance and load losses of each sequence too, and the mean of these."""

    def extended(x, w, mask, noise, **settings):
        result = rule(x, w, mask, noise, **settings)
        parts = [
            rule(x[rows], w, mask[rows], None if noise is None else noise[rows], **settings).losses
            for rows in np.split(np.arange(len(x)), sequences)
            if mask[rows].any()
        ]
        more = {
            f"sequence_{name}": np.mean([part[name] for part in parts])
            for name in ("importance", "load")
        }
        return dataclasses.replace(result, losses={**result.losses, **more})

    return extended


def softmaxes(logits):
    return np.array([losses.softmax(row) for row in logits])


def gates_of(chosen, weights, num_experts):
    """G(x), `(N, E)`, with zeros for the experts that were not chosen."""
    gates = np.zeros((len(chosen), num_experts))
    for n, row in enumerate(chosen):
        for e, weight in zip(row, weights[n], strict=True):
            gates[n, e] = weight
    return gates


def top_k(x, w, mask, noise, *, k, normalize=True, score="softmax"):
    """Mixtral section 2.1; with a sigmoid DeepSeek-V3 equations 13 and 15."""
    logits = x @ w["kernel"]
    scores = softmaxes(logits) if score == "softmax" else sigmoid(logits)
    chosen = [top(row, k) for row in logits]
    weights = np.array([row[e] for row, e in zip(scores, chosen, strict=True)])
    if normalize and k > 1:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return decision(chosen, weights, logits, scores / scores.sum(axis=1, keepdims=True), mask)


def no_token_left(
    x, w, mask, noise, *, k, factor, rounds, normalize=True, score="softmax", sequences=0
):
    """Switch Transformers, appendix B and figure 11, for k experts per token.

    Losses are those of `asked`, the plain top-k.
    """
    plain = with_all_losses(top_k, sequences) if sequences else top_k
    asked = plain(x, w, mask, noise, k=k, normalize=normalize, score=score)
    logits = x @ w["kernel"]
    num_tokens, num_experts = logits.shape
    scores = softmaxes(logits) if score == "softmax" else sigmoid(logits)
    free = [capacity_of(factor, k, num_tokens, num_experts)] * num_experts
    ranked = [top(row, rounds) for row in logits]
    places = [[] for _ in range(num_tokens)]
    for turn in range(rounds):
        for n in range(num_tokens):
            wanted = ranked[n][turn]
            if mask[n] and len(places[n]) < k and free[wanted]:
                free[wanted] -= 1
                places[n].append(wanted)
    others = [[e for e in row if e not in found] for row, found in zip(ranked, places, strict=True)]
    chosen = np.array([(places[n] + others[n])[:k] for n in range(num_tokens)])
    kept = np.array([[j < len(places[n]) for j in range(k)] for n in range(num_tokens)])
    weights = np.take_along_axis(scores, chosen, axis=1)
    if normalize and k > 1:
        weights = weights / weights.sum(axis=1, keepdims=True)
    return dataclasses.replace(asked, experts=chosen, weights=weights * kept, kept=kept)


def noisy_top_k(x, w, mask, noise, *, k):
    """Shazeer et al. 2017, equations 3 to 11."""
    clean = x @ w["kernel"]
    std = softplus(x @ w["noise_kernel"]) + 1e-2
    noisy = clean if noise is None else clean + noise * std
    num_tokens, num_experts = clean.shape
    chosen = [top(row, k) for row in noisy]
    if k == 1:
        weights = [[losses.softmax(row)[e[0]]] for row, e in zip(noisy, chosen, strict=True)]
    else:
        weights = [losses.softmax(row[e]) for row, e in zip(noisy, chosen, strict=True)]
    importance = cv_squared(gates_of(chosen, weights, num_experts)[mask].sum(axis=0))
    load = 0.0
    if k < num_experts:
        chances = np.zeros((num_tokens, num_experts))
        for n in range(num_tokens):
            for e in range(num_experts):
                others = np.sort(np.delete(noisy[n], e))[::-1]
                chances[n, e] = phi((clean[n, e] - others[k - 1]) / std[n, e])
        load = cv_squared(chances[mask].sum(axis=0))
    shares = softmaxes(clean)
    return decision(chosen, weights, clean, shares, mask, importance=importance, load=load)


def batch_priority(x, w, mask, noise, *, k, std):
    """Riquelme et al. 2021, equation 1 and appendix A."""
    clean = x @ w["kernel"]
    noisy = clean if noise is None else clean + noise * std
    chosen = [top(row, k) for row in noisy]
    weights = [row[e] for row, e in zip(softmaxes(noisy), chosen, strict=True)]
    shares = softmaxes(clean)
    load = 0.0
    if std:
        kth = np.array([row[e[-1]] for row, e in zip(noisy, chosen, strict=True)])
        load = cv_squared((1 - phi((kth[:, None] - clean) / std))[mask].sum(axis=0))
    importance = cv_squared(shares[mask].sum(axis=0))
    return decision(chosen, weights, clean, shares, mask, importance=importance, load=load)


def sigmoid_bias(x, w, mask, noise, *, k, bias, scale=1.0, groups=1, top_groups=1):
    """DeepSeek-V3, equations 12 to 16 and section 2.1.2 (node-limited routing)."""
    logits = x @ w["kernel"]
    scores = sigmoid(logits)
    num_experts = logits.shape[1]
    size = num_experts // groups
    chosen, weights = [], []
    for row in scores:
        biased = row + bias
        strength = [
            np.sort(biased[g * size : (g + 1) * size])[-min(2, size) :].sum() for g in range(groups)
        ]
        reach = {e for g in top(strength, top_groups) for e in range(g * size, (g + 1) * size)}
        best = [e for e in top(biased, num_experts) if e in reach][:k]
        chosen.append(best)
        total = row[best].sum() if k > 1 else 1.0
        weights.append(scale * row[best] / total)
    return decision(chosen, weights, logits, scores / scores.sum(axis=1, keepdims=True), mask)


def sinkhorn(x, w, mask, noise, *, k, training, iterations):
    """Clark et al. 2022, appendix B.2.1."""
    logits = x @ w["kernel"]
    scores = logits
    if training:
        scores = np.zeros_like(logits)
        plan = np.exp(logits[mask])
        by_expert = np.ones(plan.shape[1])
        for _ in range(iterations):
            by_token = 1.0 / (len(plan) * (plan @ by_expert))
            by_expert = 1.0 / (plan.shape[1] * (by_token @ plan))
        scores[mask] = by_token[:, None] * plan * by_expert
    chosen = [top(row, k) for row in scores]
    values = sigmoid(logits) if k == 1 else softmaxes(logits)
    weights = [row[e] for row, e in zip(values, chosen, strict=True)]
    return decision(chosen, weights, logits, softmaxes(logits), mask)


def relu(x, w, mask, noise, *, k, aim, penalty):
    """ReMoE, equations 5 to 9."""
    logits = x @ w["kernel"]
    num_experts = logits.shape[1]
    chosen = [top(row, k) for row in logits]
    weights = np.maximum([row[e] for row, e in zip(logits, chosen, strict=True)], 0.0)
    gates = gates_of(chosen, weights, num_experts)[mask]
    count = max(mask.sum(), 1)
    popularity = num_experts / (aim * count) * (gates > 0).sum(axis=0)
    l1 = penalty / count * np.sum(popularity * gates)
    return decision(chosen, weights, logits, softmaxes(logits), mask, weights > 0, l1=l1)


def hashed(x, w, mask, noise, *, k, projection):
    """The k largest products with a fixed random matrix; equal weights."""
    logits = x @ projection if noise is None else noise
    chosen = [top(row, k) for row in logits]
    return decision(chosen, np.full((len(x), k), 1.0 / k), logits, softmaxes(logits), mask)


def dense(x, w, mask, noise):
    """Jacobs et al. 1991, equation 1: all experts, by softmax. So does expert choice rate them
    (Zhou et al. 2022, section 3.2), whose choice is the dispatcher's."""
    logits = x @ w["kernel"]
    chosen = np.tile(np.arange(logits.shape[1]), (len(x), 1))
    return decision(chosen, softmaxes(logits), logits, softmaxes(logits), mask)


def token_hash(x, w, mask, noise, *, k, num_experts, table, ids):
    """Roller et al. 2021, section 3: a fixed table of the ids' experts; equal weights."""
    chosen = [table[each % len(table)] for each in ids]
    logits = np.zeros((len(x), num_experts))
    return decision(chosen, np.full((len(x), k), 1.0 / k), logits, softmaxes(logits), mask)


def uniform(x, w, mask, noise, *, num_experts):
    """All experts alike."""
    chosen = np.tile(np.arange(num_experts), (len(x), 1))
    logits = np.zeros(chosen.shape)
    weights = np.full(chosen.shape, 1.0 / num_experts)
    return decision(chosen, weights, logits, softmaxes(logits), mask)


def dselect_k(x, w, mask, noise, *, k, num_experts, gamma, static):
    """Hazimeh et al. 2021, equations 2 to 6 and section 4.

    A selector's vector has one entry per expert: in the authors' code the entropy sums over these,
    and codes past the last expert appear in nothing but what is missing from the vector's sum.
    """
    bits = max(math.ceil(math.log2(num_experts)), 1)
    weights = np.zeros((len(x), num_experts))
    entropy, unused = np.zeros(len(x)), np.zeros(len(x))
    for n, row in enumerate(x):
        z = (w["codes"] if static else row @ w["codes"]).reshape(k, bits)
        alpha = losses.softmax(w["alpha"] if static else row @ w["alpha"])
        for j in range(k):
            r = np.ones(num_experts)
            for code in range(num_experts):
                for bit in range(bits):
                    t = z[j, bit]
                    step = -2 / gamma**3 * t**3 + 3 / (2 * gamma) * t + 0.5
                    step = 0.0 if t <= -gamma / 2 else 1.0 if t >= gamma / 2 else step
                    is_one = code >> (bits - 1 - bit) & 1  # the highest bit first
                    r[code] *= step if is_one else 1 - step
            weights[n] += alpha[j] * r
            entropy[n] -= sum(share * np.log(share) for share in r if share > 0)
            unused[n] += 1 / max(r.sum(), 1e-6)
    logits = np.log(np.where(weights > 0, weights, 1e-20))
    count = max(mask.sum(), 1)
    return decision(
        np.tile(np.arange(num_experts), (len(x), 1)),
        weights,
        logits,
        softmaxes(logits),
        mask,
        weights > 0,
        entropy=entropy[mask].sum() / count,
        unused=unused[mask].sum() / count,
    )


def gradients(rule, x, weights, mask, noise, cotangent, coefficients, step=1e-6, **settings):
    """Central differences of sum(weights * cotangent) + weighted losses, by path.

    Who is chosen is constant near any point, and so is what the losses take for constant.
    """

    def objective(arrays):
        x, w = arrays["inputs"], {name: arrays[name] for name in weights}
        result = rule(x, w, mask, noise, **settings)
        total = np.sum(result.weights * cotangent)
        return total + sum(coefficients[name] * loss for name, loss in result.losses.items())

    at = {"inputs": x, **weights}
    slopes = {}
    for name, array in at.items():
        slope = np.zeros(array.shape)
        for index in np.ndindex(*array.shape):
            moved = []
            for sign in (1.0, -1.0):
                other = array.copy()
                other[index] += sign * step
                moved.append(objective({**at, name: other}))
            slope[index] = (moved[0] - moved[1]) / (2.0 * step)
        slopes[name] = slope
    return slopes
