"""The seam between the network and a backend: one module per backend, chosen when a network is built.

A backend module offers these, all free of parameters (weights are arguments):

| name | construct |
|---|---|
| ``Linear(activation)`` | x [R, in], weight [out, in] (, bias [out]) -> [R, out], or "gelu_tanh" or "gelu_erf" of it |
| ``Embedding()`` | table [V, H], ids [R] int32 -> [R, H] |
| ``RMSNorm(eps)`` | x [R, H], weight [H] -> [R, H] |
| ``AddRMSNorm(eps)`` | x, y [R, H], weight [H] -> x + y and its norm |
| ``Split(first, rest)`` | [..., first + rest] -> [..., first] and [..., rest] |
| ``RotaryTables(heads, dim)`` | cos, sin [R, dim / 2] -> tables, made once for all layers |
| ``Rotate(heads, dim)`` | q [R, heads, dim], k [R, dim], tables -> both, rotated in half-split pairs |
| ``SwiGLU()`` | [R, 2I], gate columns first -> [R, I] |
| ``Router(config)`` | x [R, H], weight [E, H] fp32, bias [E] fp32 -> indices [R, k] int32, weights [R, k] fp32 |
| ``Experts(config)`` | x [R, H], gate_up [E, H, 2I], down [E, I, H], indices, weights [R, k] -> [R, H] |
| ``Slots(batch, tokens, context)`` | start [B] int32 -> where CacheWrite writes |
| ``CacheWrite()`` | a layer's cache parameters, rows [R, latent], slots -> the caches with the rows in them, written in place |
| ``Window(batch, tokens, context)`` | start [B] int32 -> what LatentAttention needs to know about the slots that are seen |
| ``LatentAttention(config)`` | queries [R, heads, nope] and [R, heads, rope], what CacheWrite gave, window, k_b, v_b -> [R, heads * v] |
| ``LayerNorm(eps)`` | x [N, D], weight, bias [D] -> [N, D] |
| ``AddLayerNorm(eps)`` | x, y [N, D], weight, bias [D] -> x + y and its norm |
| ``Interpolate(taps)`` | table [entries, D], taps [N, taps] int32, weights [N, taps] -> [N, D] |
| ``ImageTables(heads)`` | cos, sin [N, dim / 2] -> tables, made once for all blocks |
| ``VisionAttention(config, dtype)`` | queries, keys and values [N, 3 * hidden], the first two of which it rotates in half-split pairs, tables, valid [1] int32 -> [N, hidden] |
| ``cache_shapes(batch, context, width)`` | the shapes of one layer's cache parameters |
| ``parameter_dtype(dtype)`` | the dtype that parameters of a model in ``dtype`` have on this backend |
| ``activation_dtype(dtype)`` | the dtype of what a model in ``dtype`` computes: inputs, outputs, caches |

R = batch * tokens rows. Everything else of the network is written once, in ``vision`` and ``language``.

A backend for a device also has ``VARIANTS``: for "attention", "experts" and "cache_write" and each choice, the entries
that differ from the module's own. So whoever runs on a device can tell which operator is wrong there, and leave out one
that a product does not have.
"""

from __future__ import annotations

import importlib
from types import ModuleType, SimpleNamespace

BACKENDS = ("plain", "cpu", "ascend", "lite")
Kernels = ModuleType | SimpleNamespace


def get_kernels(name: str, **variants: str) -> Kernels:
    """The backend called `name`.

    Args:
        variants: one of the choices for `attention`, `experts` and `cache_write`, where the backend has any.

    Raises:
        ValueError: there is no such backend or variant.
    """
    if name not in BACKENDS:
        raise ValueError(f"kernels: there is no backend {name!r}; choose one of {', '.join(BACKENDS)}")
    module = importlib.import_module(f"{__name__}.{name}")
    offered = getattr(module, "VARIANTS", {})
    entries = dict(vars(module))
    for what, choice in variants.items():
        if choice not in offered.get(what, {}):
            raise ValueError(f"kernels: {name} has no {what} called {choice!r}")
        entries |= offered[what][choice]
    return SimpleNamespace(**entries) if variants else module
