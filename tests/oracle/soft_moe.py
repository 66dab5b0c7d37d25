"""Soft MoE, Puigcerver et al. 2023, algorithms 1 and 2, one sequence and one slot at a time.

n(v) = v / sqrt(sum(v^2) + 1e-6); logits[t,s] = scale n(x[t]) . n(phi[:,s]), slots s = (e, p);
D = softmax of logits over real tokens, W = softmax over slots;
slot[s] = sum_t D[t,s] x[t]; y[t] = sum_s W[t,s] expert_e(slot[s]); padding gets 0.

Ablations (table 2): D[t,s] = 1 / real tokens; W[t,s] = 1 / slots; D[t,s] = W[t,s] = (t is s).
"""

import numpy as np

from tests.oracle import expert_mlp
from tests.oracle.losses import softmax, softmax_backward

_EPSILON = 1e-6


def _unit(v):
    return v / np.sqrt(np.sum(v * v) + _EPSILON)


def _unit_backward(v, du):
    r = 1.0 / np.sqrt(np.sum(v * v) + _EPSILON)
    return r * du - r**3 * np.sum(v * du) * v


def run(
    inputs, weights, cotangent, mask=None, *, activation="gelu", mixing="soft", per_expert=None
):
    """Inputs `(batch, tokens, d)`; `per_expert` slots where there is no phi.

    Returns:
        The outputs, the record (dispatch, combine, logits), `(batch, tokens, E, P)` each, and the
        gradients of sum(outputs * cotangent).
    """
    inputs = np.asarray(inputs, np.float64)
    batch, tokens, width = inputs.shape
    soft_dispatch = mixing in ("soft", "soft_uniform")
    soft_combine = mixing in ("soft", "uniform_soft")
    is_scored = soft_dispatch or soft_combine
    bank = expert_mlp.bank_of(weights, "experts")
    if is_scored:
        phi = np.asarray(weights["router/phi"], np.float64)
        scale = float(np.asarray(weights["router/scale"], np.float64))
        _, num_experts, per_expert = phi.shape
    else:
        assert not [name for name in weights if name.startswith("router")]
        num_experts = len(weights["experts/kernel_0"])
        phi, scale = np.zeros((width, num_experts, per_expert)), 0.0
    slots = [(e, p) for e in range(num_experts) for p in range(per_expert)]

    dbank, dphi, dscale = expert_mlp.zeros_of(bank), np.zeros_like(phi), 0.0
    dx = np.zeros_like(inputs)
    outputs, record = [], []
    for b in range(batch):
        is_token = np.ones(tokens, bool) if mask is None else np.asarray(mask[b], bool)
        real = np.flatnonzero(is_token)
        x = np.where(is_token[:, None], inputs[b], 0.0)
        logits = np.zeros((tokens, len(slots)))
        for t in range(tokens):
            for s, (e, p) in enumerate(slots):
                logits[t, s] = scale * (_unit(x[t]) @ _unit(phi[:, e, p]))
        dispatch = np.zeros_like(logits)
        if soft_combine:
            combine = np.array([softmax(row) for row in logits])
        else:
            combine = np.full_like(logits, 1.0 / len(slots))
        if soft_dispatch and len(real):
            for s in range(len(slots)):
                dispatch[real, s] = softmax(logits[real, s])
        elif len(real):
            dispatch[real] = 1.0 / len(real)
        if mixing == "identity":
            combine = np.eye(len(slots))
            dispatch = combine * is_token[:, None]

        slot_outputs, tapes = [], []
        for s, (e, _) in enumerate(slots):
            mixed = sum((dispatch[t, s] * x[t] for t in range(tokens)), np.zeros(width))
            out, tape = expert_mlp.forward(bank, e, mixed, activation)
            slot_outputs.append(out)
            tapes.append(tape)
        y = np.zeros((tokens, len(slot_outputs[0])))
        for t in real:
            for s in range(len(slots)):
                y[t] += combine[t, s] * slot_outputs[s]
        outputs.append(y)
        shape = (tokens, num_experts, per_expert)
        record.append([part.reshape(shape) for part in (dispatch, combine, logits)])

        dy = np.where(is_token[:, None], cotangent[b], 0.0)
        ddispatch, dcombine = np.zeros_like(logits), np.zeros_like(logits)
        for s, (e, _) in enumerate(slots):
            dout = np.zeros_like(slot_outputs[s])
            for t in real:
                dcombine[t, s] = dy[t] @ slot_outputs[s]
                dout += combine[t, s] * dy[t]
            dmixed = expert_mlp.backward(bank, e, tapes[s], dout, dbank)
            for t in real:
                ddispatch[t, s] = dmixed @ x[t]
                dx[b, t] += dispatch[t, s] * dmixed
        dlogits = np.zeros_like(logits)
        for t in real:
            if soft_combine:
                dlogits[t] += softmax_backward(combine[t], dcombine[t])
        for s in range(len(slots)):
            if len(real) and soft_dispatch:
                dlogits[real, s] += softmax_backward(dispatch[real, s], ddispatch[real, s])
        for t in real:
            for s, (e, p) in enumerate(slots):
                u, v = _unit(x[t]), _unit(phi[:, e, p])
                dscale += dlogits[t, s] * (u @ v)
                dx[b, t] += _unit_backward(x[t], scale * dlogits[t, s] * v)
                dphi[:, e, p] += _unit_backward(phi[:, e, p], scale * dlogits[t, s] * u)
    gradients = {
        "inputs": dx,
        **({"router/phi": dphi, "router/scale": np.array(dscale)} if is_scored else {}),
        **expert_mlp.with_prefix("experts", dbank),
    }
    dispatch, combine, logits = (np.array([row[i] for row in record]) for i in range(3))
    return np.array(outputs), (dispatch, combine, logits), gradients
