"""What each C++ operator computes, in NumPy and float64: the same names, arguments and results as in operators.cc.

`kept` is applied where an operator rounds what it keeps between two products; by default nothing is rounded.
"""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np

SMALLEST_SUM = 1e-20  # of a token's scores, see the router in modeling/kernels/plain.py


def as_is(x: np.ndarray) -> np.ndarray:
    return x


def in_bf16(x: np.ndarray) -> np.ndarray:
    """x rounded to bfloat16, by way of fp32 as the operators have it."""
    return x.astype(np.float32).astype(ml_dtypes.bfloat16).astype(np.float64)


def exactly(*arrays: np.ndarray) -> list[np.ndarray]:
    return [a.astype(np.float64) for a in arrays]


def silu(x):
    return x / (1 + np.exp(-x))


def softmax(scores, kept=as_is):
    """Over the last axis; -inf is not seen. The sum is of what was not rounded."""
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return kept(shares) / shares.sum(-1, keepdims=True)


def linear(x, weight, bias=None, *, kept=as_is):
    x, weight = exactly(x, weight)
    y = kept(x) @ weight.T
    return y if bias is None else y + bias.astype(np.float64)


def linear_gelu_tanh(x, weight, bias=None, *, kept=as_is):
    y = linear(x, weight, bias, kept=kept)
    return 0.5 * y * (1 + np.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3)))


def linear_gelu_erf(x, weight, bias=None, *, kept=as_is):
    y = linear(x, weight, bias, kept=kept)
    return 0.5 * y * (1 + np.vectorize(math.erf, otypes=[np.float64])(y / math.sqrt(2)))


def embedding(table, ids):
    return table.astype(np.float64)[ids]


def rms_norm(x, weight, eps):
    x, weight = exactly(x, weight)
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def add_rms_norm(x, y, weight, eps):
    total = x.astype(np.float64) + y
    return total, rms_norm(total, weight, eps)


def layer_norm(x, weight, bias, eps):
    x, weight, bias = exactly(x, weight, bias)
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) * weight + bias


def add_layer_norm(x, y, weight, bias, eps):
    total = x.astype(np.float64) + y
    return total, layer_norm(total, weight, bias, eps)


def split(x, *, first):
    return x[..., :first], x[..., first:]


def rotate(x, cos, sin):
    a, b = np.split(x.astype(np.float64), 2, -1)
    cos, sin = cos[:, None].astype(np.float64), sin[:, None].astype(np.float64)
    return np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)


def swiglu(x):
    gate, up = np.split(x.astype(np.float64), 2, -1)
    return silu(gate) * up


def router(x, weight, bias, options, *, k):
    """A NaN counts as the largest, and of equal scores the first is chosen, as torch.topk and a stable sort have it."""
    normalise, factor = options
    x, weight, bias = exactly(x, weight, bias)
    scores = 1 / (1 + np.exp(-(x @ weight.T)))
    choice = scores + bias
    order = np.lexsort((np.where(np.isnan(choice), 0, -choice), ~np.isnan(choice)))  # lexsort is stable
    indices = order[:, :k].astype(np.int32)
    weights = np.take_along_axis(scores, indices, 1)
    if normalise:
        weights = weights / (weights.sum(-1, keepdims=True) + SMALLEST_SUM)
    return indices, weights * factor


def experts(x, gate_up, down, indices, weights, *, kept=as_is):
    x, gate_up, down, weights = exactly(x, gate_up, down, weights)
    y = np.zeros_like(x)
    for e in range(len(gate_up)):
        tokens, slots = np.nonzero(indices == e)
        z = kept(x[tokens]) @ gate_up[e]
        gate, up = np.split(z, 2, -1)
        np.add.at(y, tokens, weights[tokens, slots, None] * (kept(silu(gate) * up) @ down[e]))
    return y


def latent_attention(q_nope, q_rope, cache, start, k_b, v_b, *, kept=as_is):
    """Keys and values of all slots up to the last new token's are expanded; later slots have no part in it."""
    q_nope, q_rope, cache, k_b, v_b = exactly(q_nope, q_rope, cache, k_b, v_b)
    tokens, lora, start = len(q_nope), k_b.shape[2], int(start[0])
    seen = cache[: start + tokens]
    keys = kept(np.einsum("sl,hnl->hsn", kept(seen[:, :lora]), k_b))
    values = kept(np.einsum("sl,hvl->hsv", kept(seen[:, :lora]), v_b))
    scale = 1 / math.sqrt(q_nope.shape[2] + q_rope.shape[2])
    scores = np.einsum("thn,hsn->hts", kept(q_nope * scale), keys)
    scores = scores + np.einsum("thr,sr->hts", kept(q_rope * scale), kept(seen[:, lora:]))
    causal = np.arange(start + tokens) <= start + np.arange(tokens)[:, None]
    shares = softmax(np.where(causal, scores, -np.inf), kept)
    return np.einsum("hts,hsv->thv", shares, values).reshape(tokens, -1)


def vision_attention(qkv, cos, sin, valid, *, kept=as_is):
    """The first `valid` patches attend to each other, queries and keys rotated; the rest is 0."""
    q, k, v = (
        part.reshape(len(qkv), -1, 2 * cos.shape[1]) for part in np.split(qkv.astype(np.float64), 3, 1)
    )
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    n = int(valid[0])
    scores = np.einsum("nhd,mhd->hnm", kept(q[:n] / math.sqrt(q.shape[2])), kept(k[:n]))
    out = np.zeros((len(q), q.shape[1] * q.shape[2]))
    out[:n] = np.einsum("hnm,mhd->nhd", softmax(scores, kept), kept(v[:n])).reshape(n, -1)
    return out


vision_attention_rounded = vision_attention


def interpolate(table, taps, weights):
    return np.einsum("nk,nkd->nd", weights.astype(np.float64), table.astype(np.float64)[taps])
