"""The auxiliary losses of token-choice routers, with their gradients."""

import numpy as np


def softmax(x):
    """Of one vector."""
    e = np.exp(x - np.max(x))
    return e / np.sum(e)


def softmax_backward(p, dp):
    return p * (dp - np.sum(dp * p))


def logsumexp(x):
    return np.max(x) + np.log(np.sum(np.exp(x - np.max(x))))


def loads(experts, is_token, num_experts):
    """How often each expert was chosen by a real token."""
    load = np.zeros(num_experts)
    for n in range(len(experts)):
        if is_token[n]:
            for e in experts[n]:
                load[e] += 1
    return load


def balance(probabilities, experts, is_token):
    """E sum_e f_e P_e, and its gradient by the probabilities (f is a constant).

    f_e is the share of expert e in all assignments of real tokens, P_e its mean probability over
    real tokens. Both are 1/E at perfect balance, where the loss is 1.
    """
    num_tokens, num_experts = probabilities.shape
    count = int(np.sum(is_token))
    gradient = np.zeros_like(probabilities)
    if count == 0:
        return 0.0, gradient
    load = loads(experts, is_token, num_experts)
    f = load / np.sum(load)
    value = 0.0
    for n in range(num_tokens):
        if is_token[n]:
            for e in range(num_experts):
                value += num_experts * f[e] * probabilities[n, e] / count
                gradient[n, e] = num_experts * f[e] / count
    return value, gradient


def sequence_balance(probabilities, experts, is_chosen, is_token, sequences):
    """DeepSeek-V3, equations 17 to 20: the balance loss of each sequence, and their mean.

    Sequences without a token have none.
    """
    num_experts = probabilities.shape[1]
    values = []
    for rows in np.split(np.arange(len(probabilities)), sequences):
        real = [n for n in rows if is_token[n]]
        if not real:
            continue
        taken = [experts[n, j] for n in real for j in np.nonzero(is_chosen[n])[0]]
        value = 0.0
        for e in range(num_experts):
            f = num_experts / max(len(taken), 1) * taken.count(e)
            value += f * np.mean([probabilities[n, e] for n in real])
        values.append(value)
    return float(np.mean(values)) if values else 0.0


def first_choice_balance(probabilities, experts, is_chosen, is_token):
    """GShard, algorithm 1, E^2 times as in its code: E sum_e c_e / S m_e, c_e of first choices."""
    num_experts = probabilities.shape[1]
    real = [n for n in range(len(probabilities)) if is_token[n]]
    if not real:
        return 0.0
    first = [experts[n, 0] for n in real if is_chosen[n, 0]]
    mean = probabilities[real].mean(axis=0)
    return num_experts * sum(first.count(e) / len(real) * mean[e] for e in range(num_experts))


def entropy(p):
    """In nats, of one distribution; 0 log 0 is 0."""
    return -sum(each * np.log(each) for each in p if each > 0)


def local_entropy(probabilities, is_token):
    """LIMoE's mean entropy of a token's distribution, of its largest value ln E."""
    if not is_token.any():
        return 0.0
    return np.mean([entropy(p) for p in probabilities[is_token]]) / np.log(probabilities.shape[1])


def global_entropy(probabilities, is_token):
    """LIMoE's entropy of the mean distribution, as what is missing to ln E, over it."""
    if not is_token.any():
        return 0.0
    mean = probabilities[is_token].mean(axis=0)
    return 1.0 - entropy(mean) / np.log(probabilities.shape[1])


def z_loss(logits, is_token):
    """Mean over real tokens of logsumexp(logits)^2, and its gradient by the logits."""
    count = int(np.sum(is_token))
    gradient = np.zeros_like(logits)
    if count == 0:
        return 0.0, gradient
    value = 0.0
    for n in range(len(logits)):
        if is_token[n]:
            lse = logsumexp(logits[n])
            value += lse**2 / count
            gradient[n] = 2.0 * lse * softmax(logits[n]) / count
    return value, gradient
