"""The sparse mixture: y[n] = sum_j w[n,j] expert_{e[n,j]}(x[n]) + sum of shared experts.

p[n] = softmax(x[n] @ router/kernel); e[n] = the k largest p[n], best first; w[n,j] = p[n,e[n,j]],
divided by their sum over j for normalised top-k with k > 1. An assignment past the C-th of its
expert in its group adds 0, where C = ceil(capacity_factor k N / E), N the group's tokens with
padding, and all first choices come before all second ones. With `weigh="inputs"`, expert(w x)
stands for w expert(x).
"""

import dataclasses
import math
from fractions import Fraction

import numpy as np

from tests.oracle import expert_mlp, losses


@dataclasses.dataclass
class Settings:
    top_k: int = 2
    normalize: bool = True
    weigh: str = "outputs"
    activation: str = "gelu"
    capacity_factor: float | None = None
    capacity_group: str = "batch"
    routing_level: str = "token"
    balance_weight: float = 0.0
    z_loss_weight: float = 0.0


@dataclasses.dataclass
class Result:
    """All `(N, ...)` over flat tokens but `outputs` and `gradients["inputs"]`.

    `decision_*` are over what the router saw: tokens, or pooled examples.
    """

    outputs: np.ndarray
    kept: np.ndarray
    decision_experts: np.ndarray
    decision_weights: np.ndarray
    decision_logits: np.ndarray
    load: np.ndarray
    balance: float
    z_loss: float
    loss: float
    gradients: dict


def capacity_of(factor, top_k, num_tokens, num_experts):
    """ceil(factor k N / E), in exact arithmetic on the factor as it is written."""
    return math.ceil(Fraction(str(factor)) * top_k * num_tokens / num_experts)


def chosen_experts(logits, top_k):
    """The k largest of each row, best first, ties to the lowest index."""
    return np.array([sorted(range(len(row)), key=lambda e: (-row[e], e))[:top_k] for row in logits])


def kept_assignments(experts, is_token, group_of, capacity, num_experts):
    """Which assignments get a slot, first come first served, first choices before second ones."""
    num_tokens, top_k = experts.shape
    kept = np.zeros((num_tokens, top_k), bool)
    used = np.zeros((int(max(group_of, default=0)) + 1, num_experts), int)
    for j in range(top_k):
        for n in range(num_tokens):
            if not is_token[n]:
                continue
            e = experts[n, j]
            if capacity is None or used[group_of[n], e] < capacity:
                kept[n, j] = True
                used[group_of[n], e] += 1
    return kept


def run(inputs, weights, cotangent=None, mask=None, **settings):
    """The forward pass and the gradients of sum(outputs * cotangent) + weighted losses."""
    s = Settings(**settings)
    inputs = np.asarray(inputs, np.float64)
    batch, width = inputs.shape[0], inputs.shape[-1]
    x = inputs.reshape(-1, width).copy()
    num_tokens = len(x)
    per_example = num_tokens // batch
    is_token = np.ones(num_tokens, bool) if mask is None else np.asarray(mask, bool).reshape(-1)
    x[~is_token] = 0.0
    kernel = np.asarray(weights["router/kernel"], np.float64)
    bank = expert_mlp.bank_of(weights, "experts")
    shared = expert_mlp.bank_of(weights, "shared_experts")
    num_experts = kernel.shape[1]

    # What the router sees: row r of `seen` decides for the tokens in `members[r]`.
    if s.routing_level == "token":
        members = [[n] for n in range(num_tokens)]
    else:
        members = [range(b * per_example, (b + 1) * per_example) for b in range(batch)]
    real = [[n for n in row if is_token[n]] for row in members]
    is_seen = np.array([len(row) > 0 for row in real])
    seen = np.array([sum((x[n] for n in row), np.zeros(width)) / max(len(row), 1) for row in real])

    logits = seen @ kernel
    p = np.array([losses.softmax(row) for row in logits])
    chosen = chosen_experts(logits, s.top_k)
    chosen_weights = np.zeros(chosen.shape)
    is_normalized = s.normalize and s.top_k > 1
    for r in range(len(chosen)):
        total = sum(p[r, e] for e in chosen[r]) if is_normalized else 1.0
        for j, e in enumerate(chosen[r]):
            chosen_weights[r, j] = p[r, e] / total
    balance, dp_balance = losses.balance(p, chosen, is_seen)
    z_loss, dlogits_z = losses.z_loss(logits, is_seen)

    row_of = np.zeros(num_tokens, int)
    for r, row in enumerate(members):
        row_of[list(row)] = r
    experts = chosen[row_of]
    w = chosen_weights[row_of]
    is_grouped = s.capacity_group == "example"
    group_of = np.arange(num_tokens) // per_example if is_grouped else np.zeros(num_tokens, int)
    capacity = None
    if s.capacity_factor is not None:
        group_size = per_example if is_grouped else num_tokens
        capacity = capacity_of(s.capacity_factor, s.top_k, group_size, num_experts)
    kept = kept_assignments(experts, is_token, group_of, capacity, num_experts)

    tapes, outputs = {}, []
    for n in range(num_tokens):
        y = np.zeros(_width_of(bank))
        if is_token[n]:
            for j in range(s.top_k):
                if kept[n, j]:
                    before, after = (w[n, j], 1.0) if s.weigh == "inputs" else (1.0, w[n, j])
                    out, tape = expert_mlp.forward(bank, experts[n, j], before * x[n], s.activation)
                    tapes[n, j] = out, tape
                    y = y + after * out
            for e in range(_size_of(shared)):
                out, tape = expert_mlp.forward(shared, e, x[n], s.activation)
                tapes[n, "shared", e] = out, tape
                y = y + out
        outputs.append(y)
    outputs = np.array(outputs)

    gradients = {}
    if cotangent is not None:
        dy = np.asarray(cotangent, np.float64).reshape(num_tokens, -1)
        dbank, dshared = expert_mlp.zeros_of(bank), expert_mlp.zeros_of(shared)
        dx, dw = np.zeros_like(x), np.zeros_like(chosen_weights)
        for n in range(num_tokens):
            if not is_token[n]:
                continue
            for j in range(s.top_k):
                if kept[n, j]:
                    out, tape = tapes[n, j]
                    if s.weigh == "inputs":
                        drow = expert_mlp.backward(bank, experts[n, j], tape, dy[n], dbank)
                        dw[row_of[n], j] += drow @ x[n]
                        dx[n] += w[n, j] * drow
                        continue
                    dw[row_of[n], j] += dy[n] @ out
                    dx[n] += expert_mlp.backward(bank, experts[n, j], tape, w[n, j] * dy[n], dbank)
            for e in range(_size_of(shared)):
                _, tape = tapes[n, "shared", e]
                dx[n] += expert_mlp.backward(shared, e, tape, dy[n], dshared)
        dkernel = np.zeros_like(kernel)
        for r in range(len(seen)):
            dp = s.balance_weight * dp_balance[r]
            total = sum(p[r, e] for e in chosen[r]) if is_normalized else 1.0
            pulled_back = dw[r] @ chosen_weights[r] if is_normalized else 0.0
            for j, e in enumerate(chosen[r]):
                dp[e] += (dw[r, j] - pulled_back) / total
            dlogits = losses.softmax_backward(p[r], dp) + s.z_loss_weight * dlogits_z[r]
            dkernel += np.outer(seen[r], dlogits)
            for n in real[r]:
                dx[n] += kernel @ dlogits / len(real[r])
        gradients = {
            "inputs": dx.reshape(inputs.shape),
            "router/kernel": dkernel,
            **expert_mlp.with_prefix("experts", dbank),
            **expert_mlp.with_prefix("shared_experts", dshared),
        }
    return Result(
        outputs=outputs.reshape(*inputs.shape[:-1], -1),
        kept=kept,
        decision_experts=chosen,
        decision_weights=chosen_weights,
        decision_logits=logits,
        load=losses.loads(chosen, is_seen, num_experts),
        balance=balance,
        z_loss=z_loss,
        loss=s.balance_weight * balance + s.z_loss_weight * z_loss,
        gradients=gradients,
    )


def _size_of(bank):
    return bank["kernel_0"].shape[0] if bank else 0


def _width_of(bank):
    last = max(int(name.split("_")[-1]) for name in bank if name.startswith("kernel_"))
    return bank[f"kernel_{last}"].shape[-1]
