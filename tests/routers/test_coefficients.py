"""The table of docs/ideas.md that converts coefficients, from each library's own formula."""

import re
from pathlib import Path

import numpy as np
import pytest
from keras import ops

from keras_moe import routers
from tests.oracle.routers import phi

pytestmark = pytest.mark.one_backend("formulas of few operations, which the oracles cover")

PAGE = Path(__file__).parents[2] / "docs" / "ideas.md"
D, E, B, T = 5, 6, 4, 8
C = 0.03


def softmax(logits):
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return exponentials / exponentials.sum(axis=-1, keepdims=True)


def top(scores, k):
    return np.argsort(-scores, axis=-1, kind="stable")[..., :k]


def one_hot(indices):
    return np.eye(E)[indices]


# Each takes the layers' logits (L, B, T, E) and k, and gives what is added to the objective.


def switch_paper(logits, k):
    """Equations 4 to 6, of each layer."""
    total = 0.0
    for layer in logits.reshape(len(logits), -1, E):
        p = softmax(layer)
        f = np.mean(one_hot(p.argmax(axis=-1)), axis=0)
        total += C * E * np.sum(f * p.mean(axis=0))
    return total


def megatron(logits, k):
    """megatron/core/transformer/moe/moe_utils.py, `switch_load_balancing_loss_func`."""
    total = 0.0
    for layer in logits.reshape(len(logits), -1, E):
        p = softmax(layer)
        tokens_per_expert = one_hot(top(p, k)).sum(axis=(0, 1))
        total += np.sum(p.sum(axis=0) * tokens_per_expert) * E * C / (k * len(p) * len(p))
    return total


def keras_hub(logits, k):
    """keras_hub/src/models/qwen3_moe/qwen3_moe_decoder.py, `compute_load_balancing_loss`."""
    total = 0.0
    for layer in logits.reshape(len(logits), -1, E):
        p = softmax(layer)
        tokens_per_expert = one_hot(top(p, k)).mean(axis=0).mean(axis=0)
        total += C * E * np.sum(tokens_per_expert * p.mean(axis=0))
    return total


def hugging_face_mixtral(logits, k):
    """transformers/models/mixtral, `load_balancing_loss_func`: layers joined along the batch."""
    p = softmax(logits.reshape(-1, E))
    tokens_per_expert = one_hot(top(p, k)).sum(axis=(0, 1)) / len(p)
    return C * E * np.sum(tokens_per_expert * p.mean(axis=0))


def hugging_face_switch(logits, k):
    """transformers/models/switch_transformers: layers joined along the sequence."""
    p = softmax(np.concatenate(list(logits), axis=1))  # (B, L T, E)
    tokens_per_group = one_hot(p.argmax(axis=-1)).mean(axis=-2)
    return C * np.mean(tokens_per_group * p.mean(axis=-2)) * E**2


def flaxformer(logits, k):
    """flaxformer/architectures/moe/routing.py, `_load_balancing_loss`; groups are sequences."""
    total = 0.0
    for layer in logits:
        p = softmax(layer)
        tokens_per_group = one_hot(top(p, k)).max(axis=-2).mean(axis=-2)
        total += C * np.mean(tokens_per_group * p.mean(axis=-2)) * E**2
    return total


def maxtext(logits, k):
    """MaxText/layers/moe.py, `load_balance_loss`, whose mean over layers train.py adds."""
    found = []
    for layer in logits:
        p = softmax(layer)
        density = one_hot(top(p, k)).sum(axis=2).mean(axis=1)
        found.append(np.mean(density * p.mean(axis=1)) * E**2 * C)
    return np.mean(found)


def deepseek_v3(logits, k):
    """Equations 17 to 20, of sigmoid scores, of each layer; the mean over sequences."""
    total = 0.0
    for layer in logits:
        for sequence in layer:
            s = 1.0 / (1.0 + np.exp(-sequence))
            f = E / (k * len(s)) * one_hot(top(s, k)).sum(axis=(0, 1))
            shares = s / s.sum(axis=-1, keepdims=True)
            total += C * np.sum(f * shares.mean(axis=0)) / B
    return total


def shazeer(logits, k):
    """Equations 6 to 11 of 2017, at inference: importance of gates, load of smooth chances."""
    total = 0.0
    for layer in logits.reshape(len(logits), -1, E):
        chosen = top(layer, k)
        gates = np.zeros_like(layer)
        rows = np.arange(len(layer))[:, None]
        gates[rows, chosen] = softmax(layer[rows, chosen])
        std = np.log(2.0) + 1e-2  # softplus of a noise kernel of zeros
        others = np.sort(np.where(np.eye(E, dtype=bool)[None], -np.inf, layer[:, None]), axis=-1)
        chances = phi((layer - others[:, :, -k]) / std)
        for amounts in (gates.sum(axis=0), chances.sum(axis=0)):
            total += C * (np.std(amounts) / np.mean(amounts)) ** 2
    return total


def gshard(logits, k):
    """Algorithm 1, times E^2 as in lingvo/core/gshard_layers.py, in one group."""
    total = 0.0
    for layer in logits.reshape(len(logits), -1, E):
        p = softmax(layer)
        first = one_hot(p.argmax(axis=-1)).mean(axis=0)
        total += C * np.mean(first * p.mean(axis=0)) * E**2
    return total


def vmoe(logits, k):
    """vmoe/nn/routing.py, `_importance_auxiliary_loss` and `_load_auxiliary_loss`, without noise
    drawn, in one group; vit_moe.py sums its layers."""
    total, std = 0.0, 1.0 / E
    for layer in logits.reshape(len(logits), -1, E):
        threshold = np.sort(layer, axis=-1)[:, -k, None]
        chances = 1.0 - phi((threshold - layer) / std)
        for amounts in (softmax(layer).sum(axis=0), chances.sum(axis=0)):
            total += C * (np.std(amounts) / np.mean(amounts)) ** 2
    return total


def vmoe_by_image(logits, k):
    """The same where a group is an image: the mean over groups."""
    return np.mean([vmoe(logits[:, image : image + 1], k) for image in range(logits.shape[1])])


def limoe(logits, k):
    """Local entropy - entropy of the mean, in nats, without threshold, of each layer; and ln E,
    which has no gradient, so that the global loss is 0 at best as ours."""
    total = 0.0
    for layer in logits.reshape(len(logits), -1, E):
        p = softmax(layer)
        mean = p.mean(axis=0)
        local, of_mean = -np.mean(np.sum(p * np.log(p), axis=-1)), -np.sum(mean * np.log(mean))
        total += C * (local - of_mean + np.log(E))
    return total


def token_choice(k, weights):
    return routers.TopKRouter(E, k, losses={"balance": 0.0, "z_loss": 0.0, **weights})


def sigmoid(k, weights):
    return routers.SigmoidBiasRouter(E, k, losses=weights)


def noisy(k, weights):
    return routers.NoisyTopKRouter(E, k, losses=weights)


def prioritised(k, weights):
    return routers.BatchPriorityRouter(E, k, losses={"importance": 0, "load": 0, **weights})


# Row of the table -> the library's formula, ours, and values of k that it allows.
ROWS = {
    "Switch Transformer paper": (switch_paper, token_choice, (1,)),
    "Megatron-LM": (megatron, token_choice, (1, 2, 3)),
    "KerasHub": (keras_hub, token_choice, (1, 2, 3)),
    "Hugging Face: Mixtral, Qwen-MoE, OLMoE": (hugging_face_mixtral, token_choice, (1, 2, 3)),
    "Hugging Face: Switch Transformers": (hugging_face_switch, token_choice, (1,)),
    "flaxformer": (flaxformer, token_choice, (1, 2, 3)),
    "MaxText": (maxtext, token_choice, (1, 2, 3)),
    "DeepSeek-V3": (deepseek_v3, sigmoid, (1, 2, 3)),
    "GShard": (gshard, token_choice, (1, 2, 3)),
    "V-MoE": (vmoe, prioritised, (1, 2, 3)),
    "V-MoE, a group for each image": (vmoe_by_image, prioritised, (1, 2, 3)),
    "Shazeer et al. 2017": (shazeer, noisy, (2, 3)),  # k = 1 has another weight here
    "LIMoE, in nats": (limoe, token_choice, (1, 2)),
}


def table():
    """Rows of the page: name -> cells."""
    text = PAGE.read_text().split("| c from |")[1].split("\n\n")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()[2:]]
    return {name: cells for name, *cells in rows}


def weights_of(conversion, k, num_layers):
    """`balance = c k / L` as the losses of a router."""
    scales = {"c": C, "k": k, "/ L": 1 / num_layers, "ln E": np.log(E)}
    found = {}
    for name, formula in re.findall(r"`(\w+) = ([^`]*)`", conversion):
        factors = re.findall(r"c|k|/ L|ln E", formula)
        assert " ".join(factors) == formula
        found[name] = float(np.prod([scales[factor] for factor in factors]))
    return found


def ours(make, logits, k, weights, sequences):
    """The sum over layers of what our router adds for logits `(L, B, T, E)`."""
    total = 0.0
    for layer in logits.reshape(len(logits), -1, E):
        router = make(k, weights)
        router.build((None, E))
        router.kernel.assign(np.eye(E))
        if hasattr(router, "noise_kernel"):
            router.noise_kernel.assign(np.zeros((E, E)))
        x = layer.astype("float32")
        routing = router(ops.convert_to_tensor(x), num_sequences=sequences)
        for name, weight in router.loss_weights.items():
            total += weight * float(ops.convert_to_numpy(routing.losses[name]))
    return total


def test_every_row_of_the_table_is_tested():
    assert set(table()) == set(ROWS)


rows = pytest.mark.parametrize(
    ("row", "k"), [(row, k) for row, (_, _, every) in ROWS.items() for k in every]
)


@pytest.mark.parametrize("num_layers", [1, 3])
@rows
def test_conversion(row, k, num_layers):
    """Random logits for one layer; for three, three times the same, so that they are alike."""
    formula, make, _ = ROWS[row]
    one = np.random.default_rng(k).normal(size=(1, B, T, E)) + np.linspace(0.0, 1.0, E)
    logits = np.repeat(one, num_layers, axis=0)
    weights = weights_of(table()[row][-1], k, num_layers)
    assert ours(make, logits, k, weights, B) == pytest.approx(formula(logits, k), rel=1e-5)


@rows
def test_what_else_the_table_says(row, k):
    formula, *_ = ROWS[row]
    tokens, layers, _, conversion = table()[row]
    one = np.random.default_rng(k).normal(size=(1, B, T, E)) + np.linspace(0.0, 1.0, E)
    of_two = formula(np.repeat(one, 2, axis=0), k) / formula(one, k)
    assert of_two == pytest.approx(1.0 if "averaged" in layers else 2.0)
    is_by_sequence = formula(one, k) != pytest.approx(formula(one.reshape(1, 1, -1, E), k))
    assert is_by_sequence == ("sequence_" in conversion)
    assert is_by_sequence == ("sequence" in tokens or row == "flaxformer")


@rows
def test_value_at_balance(row, k):
    """Every sequence's tokens prefer experts n, n + 1, ... in turn."""
    stated = table()[row][2].removesuffix(" (k = 1)")
    preference = np.stack([np.roll(-np.arange(E), n) for n in range(E)]).astype("float64")
    value = ROWS[row][0](np.broadcast_to(preference, (1, B, E, E)), k) / C
    if stated != "-":
        assert value == pytest.approx({"k": k}.get(stated) or float(stated), abs=1e-9)
