"""What each operator of the graphs gives, in plain numpy, from its documentation; and inputs that it may be given.

A formula takes the operator's arguments in the order of the graph: arrays (floats in fp32, whatever the graph has), tuples
of these for lists, and constants. It gives an array or a tuple; None stands for a result, or rows, that are not defined.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

# How near: data that is only moved is the same; one result is rounded once; fused operators round inside, too.
MOVED, ROUNDED, FUSED = "moved", "rounded", "fused"
TOLERANCES = {
    "float32": {MOVED: 0.0, ROUNDED: 1e-5, FUSED: 1e-4},
    "float16": {MOVED: 0.0, ROUNDED: 2.0**-10, FUSED: 2.0**-8},
    "bfloat16": {MOVED: 0.0, ROUNDED: 2.0**-8, FUSED: 2.0**-6},
}
"""Relative L2 distance, by the dtype of the result."""

_erf = np.vectorize(math.erf, otypes=[np.float64])


def sigmoid(x):
    return 1 / (1 + np.exp(-np.asarray(x, np.float64)))


def softmax(x, axis):
    axis = axis[0] if isinstance(axis, tuple) else axis
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def swapped(x, transpose):
    return np.swapaxes(x, -1, -2) if transpose else x


def axes(x, axis):
    return tuple(range(x.ndim)) if axis in (None, ()) else axis if isinstance(axis, tuple) else (axis,)


def rms_norm(x, gamma, eps):
    rstd = 1 / np.sqrt(np.square(x, dtype=np.float64).mean(-1, keepdims=True) + eps)
    return x * rstd * gamma, rstd


def add_rms_norm(x, y, gamma, eps):
    return *rms_norm(x + y, gamma, eps), x + y


def layer_norm(x, gamma, beta, begin, _, eps):
    over = tuple(range(begin % x.ndim, x.ndim))
    mean = x.mean(over, keepdims=True, dtype=np.float64)
    rstd = 1 / np.sqrt(np.square(x - mean).mean(over, keepdims=True) + eps)
    return (
        (x - mean) * rstd * gamma + beta,
        mean,
        None,
    )  # the third is the variance or its root, by backend; unused


def swiglu(x, axis):
    gate, up = np.split(x, 2, axis)
    return gate * sigmoid(gate) * up


def top(x, k, axis, largest):
    order = np.argsort(-x if largest else x, axis, kind="stable")
    order = np.take(order, range(k), axis)
    return np.take_along_axis(x, order, axis), order


def strided_slice(x, begin, end, strides, begin_mask, end_mask, ellipsis, new, shrink):
    index: list[Any] = []
    for i, (b, e, s) in enumerate(zip(begin, end, strides)):
        if ellipsis >> i & 1:
            index.append(Ellipsis)
        elif new >> i & 1:
            index.append(None)
        elif shrink >> i & 1:
            index.append(b)
        else:
            index.append(slice(None if begin_mask >> i & 1 else b, None if end_mask >> i & 1 else e, s))
    return x[tuple(index)]


def scatter_update(target, indices, updates):
    out = target.copy()
    out[indices] = updates
    return out


def kv_cache_scatter_update(cache, start, rows, axis, reduce):
    out = np.moveaxis(cache.copy(), axis, 2)
    rows = np.moveaxis(rows, axis, 2)
    for b, at in enumerate(start):
        out[b, :, at : at + rows.shape[2]] = rows[b]
    return np.moveaxis(out, 2, axis)


def moe_init_routing(x, experts, active, capacity, number, drop, flag, before):
    order = np.argsort(experts.reshape(-1), kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    counts = np.bincount(experts.reshape(-1), minlength=number)
    return x[order // experts.shape[1]], rank, counts if flag == 2 else counts.cumsum(), None


def moe_token_unpermute(y, indices, probs, *_):
    return (y[indices].reshape(*probs.shape, -1) * probs[..., None]).sum(1)


def grouped_matmul_v4(x, weight, *arguments):
    (rows,), (experts,), counts = x, weight, arguments[6]
    ends = np.cumsum(counts) if arguments[12] == 1 else counts
    return (np.concatenate([r @ w for r, w in zip(np.split(rows, ends[:-1]), experts)]),)


def fused_infer_attention_score(q, k, v, _, mask, lengths, kv_lengths, *arguments):
    """Layout BNSD; rows of the query past its length are not defined."""
    scale, layout = arguments[18], arguments[21]
    if layout != 1:
        raise NotImplementedError(f"layout {layout}")
    (k,), (v,) = k, v
    out = np.full((*q.shape[:3], v.shape[3]), np.nan)
    for b in range(len(q)):
        n = q.shape[2] if lengths is None else int(lengths[b % len(lengths)])
        m = k.shape[2] if kv_lengths is None else int(kv_lengths[b % len(kv_lengths)])
        for h in range(q.shape[1]):
            scores = q[b, h, :n] @ k[b, h, :m].T * np.float32(scale)
            if mask is not None:
                scores = np.where(mask[b % len(mask), 0, :n, :m], -np.inf, scores)
            out[b, h, :n] = softmax(scores, -1) @ v[b, h, :m]
    return out, None


FORMULAS: dict[str, tuple[Callable[..., Any], str]] = {
    "Add": (lambda x, y: x + y, ROUNDED),
    "AddExt": (lambda x, y, alpha: x + y * alpha, ROUNDED),
    "AddRmsNorm": (add_rms_norm, ROUNDED),
    "BatchMatMul": (lambda x, y, a, b: swapped(x, a) @ swapped(y, b), ROUNDED),
    "BiasAdd": (lambda x, b, _: x + b.reshape(-1, *[1] * (x.ndim - 2)), ROUNDED),
    "BroadcastTo": (np.broadcast_to, MOVED),
    "Cast": (lambda x, _: x, ROUNDED),
    "Concat": (np.concatenate, MOVED),
    "ConstantPadND": (
        lambda x, pad, value: np.pad(
            x,
            [(0, 0)] * (x.ndim - len(pad) // 2) + [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)],
            constant_values=value,
        ),
        MOVED,
    ),
    "Div": (lambda x, y: x / y, ROUNDED),
    "Equal": (lambda x, y: x == y, MOVED),
    "Erf": (_erf, ROUNDED),
    "ExpandDims": (np.expand_dims, MOVED),
    "FusedInferAttentionScore": (fused_infer_attention_score, FUSED),
    "Gather": (lambda x, i, axis, _: np.take(x, i, axis), MOVED),
    "GatherD": (lambda x, axis, i: np.take_along_axis(x, i, axis), MOVED),
    "GeLU": (lambda x: x * 0.5 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), ROUNDED),
    "Greater": (lambda x, y: x > y, MOVED),
    "GreaterEqual": (lambda x, y: x >= y, MOVED),
    "GroupedMatmulV4": (grouped_matmul_v4, ROUNDED),
    "InnerMoeTokenUnpermute": (moe_token_unpermute, ROUNDED),
    "KVCacheScatterUpdate": (kv_cache_scatter_update, MOVED),
    "LayerNorm": (layer_norm, ROUNDED),
    "MatMul": (lambda x, y, a, b: swapped(x, a) @ swapped(y, b), ROUNDED),
    "MoeInitRoutingV2": (moe_init_routing, MOVED),
    "Mul": (lambda x, y: x * y, ROUNDED),
    "Muls": (lambda x, y: x * y, ROUNDED),
    "Neg": (lambda x: -x, MOVED),
    "ReduceMean": (lambda x, axis, keep: x.mean(axes(x, axis), keepdims=keep), ROUNDED),
    "ReduceSum": (lambda x, axis, keep, _: x.sum(axes(x, axis), keepdims=keep), ROUNDED),
    "RmsNorm": (rms_norm, ROUNDED),
    "Rsqrt": (lambda x: 1 / np.sqrt(x), ROUNDED),
    "ScatterUpdate": (scatter_update, MOVED),
    "Select": (np.where, MOVED),
    "SiLU": (lambda x: x * sigmoid(x), ROUNDED),
    "Sigmoid": (sigmoid, ROUNDED),
    "Softmax": (softmax, ROUNDED),
    "Split": (lambda x, axis, n: tuple(np.split(x, n, axis)), MOVED),
    "SplitWithSize": (lambda x, sizes, axis: tuple(np.split(x, np.cumsum(sizes)[:-1], axis)), MOVED),
    "Stack": (np.stack, MOVED),
    "StridedSlice": (strided_slice, MOVED),
    "Sub": (lambda x, y: x - y, ROUNDED),
    "Swiglu": (swiglu, ROUNDED),
    "TopK": (lambda x, k, *_: top(x, k, -1, True), MOVED),
    "TopkExt": (lambda x, k, axis, largest, _: top(x, k, axis, largest), MOVED),
    "Transpose": (np.transpose, MOVED),
    "Unstack": (lambda x: tuple(np.moveaxis(x, 0, 0)), MOVED),
}
"""By operator: its formula, and how near a kernel has to come."""


# ---- inputs ---------------------------------------------------------------------------------------------------------


def distinct(rng: np.random.Generator, rows: int, count: int, below: int) -> np.ndarray:
    """[rows, count] numbers below a limit, none twice in a row."""
    return np.stack([rng.permutation(below)[:count] for _ in range(rows)])


def adjust(operator: str, arguments: list[Any], rng: np.random.Generator) -> None:
    """Puts numbers that mean something in the place of random ones: indices, lengths, masks, what must be positive."""
    a = arguments
    if operator == "Gather":
        a[1] = rng.integers(0, a[0].shape[a[2]], a[1].shape)
    elif operator == "GatherD":
        a[2] = rng.integers(0, a[0].shape[a[1]], a[2].shape)
    elif operator == "ScatterUpdate":
        a[1] = distinct(rng, 1, a[1].size, len(a[0])).reshape(a[1].shape)
    elif operator == "KVCacheScatterUpdate":
        a[1] = rng.integers(0, a[0].shape[a[3]] - a[2].shape[a[3]] + 1, a[1].shape)
        a[1][-1] = a[0].shape[a[3]] - a[2].shape[a[3]]  # the last slots
    elif operator == "MoeInitRoutingV2":
        a[1] = distinct(rng, len(a[1]), a[1].shape[1], a[4])
    elif operator == "GroupedMatmulV4":
        rows, experts = len(a[0][0]), len(a[1][0])
        a[8] = np.bincount(rng.integers(0, experts - 1, rows), minlength=experts)  # the last expert has none
    elif operator == "InnerMoeTokenUnpermute":
        a[1], a[2] = rng.permutation(len(a[0])), np.abs(a[2])
    elif operator == "FusedInferAttentionScore":
        queries, keys = a[0].shape[2], a[1][0].shape[2]
        if a[4] is not None:  # a chunk somewhere in the window
            start = rng.integers(0, keys - queries + 1, (len(a[4]), 1, 1, 1))
            a[4] = np.arange(keys) > start + np.arange(queries)[:, None]
        for i in (5, 6):
            if a[i] is not None:
                a[i] = np.full(a[i].shape, max(1, 3 * queries // 4))
    elif operator in ("Div", "Rsqrt"):
        a[-1] = np.abs(a[-1]) + np.float32(0.5)
