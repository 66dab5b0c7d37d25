"""What docs/ideas.md says of losses from elsewhere where there is padding."""

import numpy as np
import pytest
from keras import ops

from keras_moe import routers

pytestmark = pytest.mark.one_backend("a formula of means")

B, T, E, C = 3, 8, 5, 0.01
REAL = 6  # tokens of each sequence
R = REAL / T
RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(B, T, E)) + np.linspace(0.0, 1.0, E)
MASK = np.broadcast_to(np.arange(T) < REAL, (B, T))


def softmax(x):
    shifted = np.exp(x - x.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def ours(k, **losses):
    """What a router adds for `LOGITS`, with padding masked."""
    router = routers.TopKRouter(E, top_k=k, losses=losses)
    router.build((None, E))
    router.kernel.assign(np.eye(E))
    x = ops.convert_to_tensor(LOGITS.reshape(-1, E).astype("float32"))
    routing = router(x, mask=ops.convert_to_tensor(MASK.reshape(-1)), num_sequences=B)
    values = {name: float(ops.convert_to_numpy(value)) for name, value in routing.losses.items()}
    return sum(weight * values[name] for name, weight in losses.items())


@pytest.mark.parametrize("k", [1, 2])
def test_balance_of_flaxformer(k):
    """`TokensChooseMaskedRouter`: padding is 0 in both means, over all tokens of a group."""
    p = softmax(LOGITS * MASK[..., None])
    chosen = np.argsort(-p, axis=-1, kind="stable")[..., :k]
    taken = (chosen[..., None] == np.arange(E)).any(axis=-2) & MASK[..., None]
    p = p * MASK[..., None]
    theirs = C * np.mean(taken.mean(axis=1) * p.mean(axis=1)) * E**2
    assert ours(k, sequence_balance=C * k * R**2) == pytest.approx(theirs, rel=1e-5)
    assert ours(k, sequence_balance=C * k) != pytest.approx(theirs, rel=0.3)


def test_z_loss_of_flaxformer():
    """Logits of padding are 0, so each adds (ln E)^2, a constant."""
    log_z = np.log(np.exp(LOGITS * MASK[..., None]).sum(axis=-1))
    theirs = C * np.mean(log_z**2)
    constant = C * (1 - R) * np.log(E) ** 2
    assert ours(2, z_loss=C * R) + constant == pytest.approx(theirs, rel=1e-5)
