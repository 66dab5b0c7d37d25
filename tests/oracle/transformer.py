"""Pre-norm Transformer blocks in float64: x + attention(norm(x)), then x + feed_forward(norm(x)).

attention(y) = concat over heads of softmax(q k^T / sqrt(d / heads)) v, projected; causal: row n of
the softmax is over columns 0 to n. A mask `(b, m)` leaves columns out.
"""

import math

import numpy as np

from tests.oracle.losses import softmax as softmax_row


def layer_norm(x, weights, name, epsilon=1e-6):
    centred = x - x.mean(-1, keepdims=True)
    normed = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + epsilon)
    return normed * weights[f"{name}/gamma"] + weights.get(f"{name}/beta", 0.0)


def softmax(x):
    return np.apply_along_axis(softmax_row, -1, x)


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def attention(y, weights, name, *, qk_norm=False, is_causal=False, mask=None):
    def project(part):
        kernel = weights[f"{name}/{part}/kernel"]
        return np.einsum("bnd,dhk->bhnk", y, kernel) + weights[f"{name}/{part}/bias"][:, None, :]

    query, key, value = project("query"), project("key"), project("value")
    if qk_norm:
        query = layer_norm(query, weights, f"{name}/query_norm")
        key = layer_norm(key, weights, f"{name}/key_norm")
    scores = np.einsum("bhnk,bhmk->bhnm", query, key) / math.sqrt(query.shape[-1])
    if is_causal:
        places = np.arange(y.shape[1])
        scores = np.where(places[None, :] > places[:, None], -1e30, scores)
    if mask is not None:
        scores = np.where(mask[:, None, None, :], scores, -1e30)
    mixed = np.einsum("bhnm,bhmk->bnhk", softmax(scores), value)
    out = np.einsum("bnhk,hkd->bnd", mixed, weights[f"{name}/attention_output/kernel"])
    return out + weights[f"{name}/attention_output/bias"]


def mlp(y, weights, prefix):
    hidden = gelu(y @ weights[f"{prefix}_hidden/kernel"] + weights[f"{prefix}_hidden/bias"])
    return hidden @ weights[f"{prefix}_output/kernel"] + weights[f"{prefix}_output/bias"]


def blocks(x, weights, depth, *, mixtures=None, mask=None, **attention_arguments):
    """`mixtures`: block -> (layer name, function of inputs and the layer's own weights)."""
    for block in range(depth):
        name = f"block_{block}"
        y = layer_norm(x, weights, f"{name}_attention_norm")
        x = x + attention(y, weights, f"{name}_attention", mask=mask, **attention_arguments)
        y = layer_norm(x, weights, f"{name}_feed_forward_norm")
        if block in (mixtures or {}):
            layer, run = mixtures[block]
            x = x + run(y, own_weights(weights, layer))
        else:
            x = x + mlp(y, weights, f"{name}_mlp")
    return x


def own_weights(weights, layer):
    prefix = f"{layer}/"
    return {
        path.removeprefix(prefix): value
        for path, value in weights.items()
        if path.startswith(prefix)
    }
