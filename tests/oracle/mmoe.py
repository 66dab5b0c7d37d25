"""Multi-gate mixture of experts, Ma et al. 2018, equations 6 to 8.

g[n,t] = softmax(x[n] @ gates/kernel[t] (+ gates/bias[t])), or of the hidden layers `gate_hidden` of
task t instead of x[n]; y_t[n] = sum_e g[n,t,e] expert_e(x[n]), experts activated on every layer.
"""

import numpy as np

from tests.oracle import expert_mlp
from tests.oracle.losses import softmax, softmax_backward


def run(inputs, weights, cotangents, mask=None, *, activation="relu"):
    """Inputs `(..., d)`, cotangents `(tasks, ..., out)`.

    Returns:
        The outputs `(tasks, ..., out)`, the gates `(..., tasks, E)`, and the gradients of
        sum(outputs * cotangents).
    """
    inputs = np.asarray(inputs, np.float64)
    cotangents = np.asarray(cotangents, np.float64)
    x = inputs.reshape(-1, inputs.shape[-1])
    is_token = np.ones(len(x), bool) if mask is None else np.asarray(mask, bool).reshape(-1)
    kernel = np.asarray(weights["gates/kernel"], np.float64)
    bias = np.asarray(weights.get("gates/bias", np.zeros(kernel.shape[::2])), np.float64)
    bank = expert_mlp.bank_of(weights, "experts")
    hidden = expert_mlp.bank_of(weights, "gate_hidden")
    tasks, _, num_experts = kernel.shape
    dy = cotangents.reshape(tasks, len(x), -1)

    dbank, dhidden, dkernel = (
        expert_mlp.zeros_of(bank),
        expert_mlp.zeros_of(hidden),
        np.zeros_like(kernel),
    )
    dbias = np.zeros_like(bias)
    dx = np.zeros_like(x)
    outputs = np.zeros(dy.shape)
    gates = np.zeros((len(x), tasks, num_experts))
    for n in range(len(x)):
        row = x[n] if is_token[n] else np.zeros_like(x[n])
        expert_outputs, tapes, dout = [], [], []
        for e in range(num_experts):
            out, tape = expert_mlp.forward(bank, e, row, activation, activate_last=True)
            expert_outputs.append(out)
            tapes.append(tape)
            dout.append(np.zeros_like(out))
        for t in range(tasks):
            seen, tape = row, None
            if hidden:
                seen, tape = expert_mlp.forward(hidden, t, row, activation, activate_last=True)
            g = gates[n, t] = softmax(seen @ kernel[t] + bias[t])
            if not is_token[n]:
                continue
            dg = np.zeros(num_experts)
            for e in range(num_experts):
                outputs[t, n] += g[e] * expert_outputs[e]
                dg[e] = dy[t, n] @ expert_outputs[e]
                dout[e] += g[e] * dy[t, n]
            dlogits = softmax_backward(g, dg)
            dkernel[t] += np.outer(seen, dlogits)
            dbias[t] += dlogits
            dseen = kernel[t] @ dlogits
            if hidden:
                dseen = expert_mlp.backward(hidden, t, tape, dseen, dhidden)
            dx[n] += dseen
        if is_token[n]:
            for e in range(num_experts):
                dx[n] += expert_mlp.backward(bank, e, tapes[e], dout[e], dbank)
    leading = inputs.shape[:-1]
    gradients = {
        "inputs": dx.reshape(inputs.shape),
        "gates/kernel": dkernel,
        **expert_mlp.with_prefix("experts", dbank),
        **({"gates/bias": dbias} if "gates/bias" in weights else {}),
        **expert_mlp.with_prefix("gate_hidden", dhidden),
    }
    return (
        outputs.reshape(tasks, *leading, -1),
        gates.reshape(*leading, tasks, num_experts),
        gradients,
    )
