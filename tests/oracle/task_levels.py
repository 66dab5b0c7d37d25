"""CGC, PLE and AdaTT in float64, from the papers' equations, one row and one expert at a time.

CGC (Tang et al. 2020, equations 1 to 4): g_t = softmax(x W_t) over the task's own experts and the
shared ones, y_t = sum_e g_{t,e} expert_e(x). PLE (equations 5 to 7): on level j a task's experts
and gate read the task's y of level j - 1, the shared ones that of the shared gate, which takes all
experts; the last level has no shared gate.
AdaTT (Li et al. 2023, section 3): y_t = sum over all experts of softmax(x_t W_t + b_t)_e expert_e +
sum over the task's own of v_{t,e} expert_e(x_t), v = 1 where every unit has one expert.
"""

import numpy as np

from tests.oracle import expert_mlp
from tests.oracle.losses import softmax


def level(units, weights, *, tasks, own, shared, gates, is_adatt):
    """One level.

    Args:
        units: what each unit reads, `(N, d)` each; tasks first, then what is shared.
        weights: the level's, by path.
        tasks: how many tasks there are.
        own: experts of each task.
        shared: shared experts.
        gates: how many gates there are: the tasks', and perhaps the shared one.
        is_adatt: whether gates take all experts, with a residual.

    Returns:
        What each gate gives, a list of `(N, out)`.
    """
    bank = expert_mlp.bank_of(weights, "experts")
    kernel = np.asarray(weights["gates/kernel"], np.float64)
    bias = np.asarray(weights.get("gates/bias", np.zeros(kernel.shape[::2])), np.float64)
    owner = [task for task in range(tasks) for _ in range(own)] + [tasks] * shared
    outputs = []
    for gate in range(gates):
        rows = []
        for n in range(len(units[0])):
            takes = [
                e
                for e, unit in enumerate(owner)
                if is_adatt or gate == tasks or unit in (gate, tasks)
            ]
            scores = [units[gate][n] @ kernel[gate][:, e] + bias[gate][e] for e in takes]
            total = 0.0
            for e, weight in zip(takes, softmax(np.array(scores)), strict=True):
                if is_adatt and owner[e] == gate:
                    weight = weight + native(weights, gate, e - owner.index(gate), tasks)
                expert, _ = expert_mlp.forward(
                    bank, e, units[owner[e]][n], "relu", activate_last=True
                )
                total = total + weight * expert
            rows.append(total)
        outputs.append(np.array(rows))
    return outputs


def native(weights, gate, place, tasks):
    if "native" not in weights:
        return 1.0
    name = "native" if gate < tasks else "shared_native"
    return np.asarray(weights[name], np.float64)[gate if gate < tasks else 0][place]


def stack(inputs, levels, *, tasks, own, shared, is_adatt):
    """Levels one on another: the outputs of the last one, a list of `(N, out)`, one per task."""
    units = [np.asarray(inputs, np.float64)] * (tasks + 1)
    for number, weights in enumerate(levels):
        has_shared_gate = shared > 0 and number < len(levels) - 1
        units = level(
            units,
            weights,
            tasks=tasks,
            own=own,
            shared=shared,
            gates=tasks + has_shared_gate,
            is_adatt=is_adatt,
        )
    return units
