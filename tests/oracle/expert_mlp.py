"""One expert of a bank, one row at a time.

h_0 = x; h_{i+1} = act(h_i @ kernel_i[e] + bias_i[e]), the last layer linear unless
`activate_last`. Where the bank has `gate_kernel_i`, an activated layer is
act(h_i @ gate_kernel_i[e] + gate_bias_i[e]) * (h_i @ kernel_i[e] + bias_i[e]).
"""

import numpy as np

from tests.oracle.activations import BY_NAME


def bank_of(weights, prefix):
    """The weights below `prefix/`, by their last name, float64."""
    return {
        name[len(prefix) + 1 :]: np.asarray(value, np.float64)
        for name, value in weights.items()
        if name.startswith(prefix + "/")
    }


def forward(bank, e, x, activation, activate_last=False):
    """Returns expert e's output for the row x, and what `backward` needs."""
    act = BY_NAME[activation]
    num_layers = sum(name.startswith("kernel_") for name in bank)
    h, tape = x, []
    for i in range(num_layers):
        value = h @ bank[f"kernel_{i}"][e]
        if f"bias_{i}" in bank:
            value = value + bank[f"bias_{i}"][e]
        if i == num_layers - 1 and not activate_last:
            tape.append((h, None, None, None))
            h = value
        elif f"gate_kernel_{i}" in bank:
            gate = h @ bank[f"gate_kernel_{i}"][e]
            if f"gate_bias_{i}" in bank:
                gate = gate + bank[f"gate_bias_{i}"][e]
            opened, slope = act(gate)
            tape.append((h, opened, slope, value))
            h = opened * value
        else:
            activated, slope = act(value)
            tape.append((h, None, slope, None))
            h = activated
    return h, tape


def backward(bank, e, tape, dy, gradients):
    """Adds expert e's weight gradients to `gradients` and returns the gradient of its row."""
    for i in reversed(range(len(tape))):
        h, opened, slope, value = tape[i]
        dh = np.zeros_like(h)
        if value is not None:  # gated
            dgate = dy * value * slope
            gradients[f"gate_kernel_{i}"][e] += np.outer(h, dgate)
            if f"gate_bias_{i}" in bank:
                gradients[f"gate_bias_{i}"][e] += dgate
            dh += bank[f"gate_kernel_{i}"][e] @ dgate
            dvalue = dy * opened
        elif slope is not None:  # activated
            dvalue = dy * slope
        else:
            dvalue = dy
        gradients[f"kernel_{i}"][e] += np.outer(h, dvalue)
        if f"bias_{i}" in bank:
            gradients[f"bias_{i}"][e] += dvalue
        dy = dh + bank[f"kernel_{i}"][e] @ dvalue
    return dy


def zeros_of(bank):
    return {name: np.zeros_like(value) for name, value in bank.items()}


def with_prefix(prefix, gradients):
    return {f"{prefix}/{name}": value for name, value in gradients.items()}


def run(inputs, weights, cotangent, *, activation, activate_last=False, block_experts=None):
    """`ExpertMLP` on `(E, C, d)`, `(1, C, d)`, or `(G, B, d)` with `block_experts`.

    Returns:
        The outputs, and the gradients of sum(outputs * cotangent).
    """
    inputs = np.asarray(inputs, np.float64)
    bank = {name: np.asarray(value, np.float64) for name, value in weights.items()}
    num_experts = bank["kernel_0"].shape[0]
    pairs = [(e, 0 if inputs.shape[0] == 1 else e, e) for e in range(num_experts)]
    if block_experts is not None:
        pairs = [(g, g, int(e)) for g, e in enumerate(block_experts)]
    gradients, dx = zeros_of(bank), np.zeros_like(inputs)
    outputs = []
    for out_row, in_row, e in pairs:
        block = []
        for c in range(inputs.shape[1]):
            y, tape = forward(bank, e, inputs[in_row, c], activation, activate_last)
            block.append(y)
            dx[in_row, c] += backward(bank, e, tape, cotangent[out_row, c], gradients)
        outputs.append(block)
    return np.array(outputs), {"inputs": dx, **gradients}
