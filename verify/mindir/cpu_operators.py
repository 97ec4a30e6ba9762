"""The library of CPU operators (`modeling/kernels/native`), as plain formulas: what its names, arguments and results mean.

Weights are bf16 or fp32, everything else is fp32 and int32. Nothing is rounded here, so these are the operators as they
compute with `library.set_exact`. Caches come as what a write into them gave.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from . import norms
from .errors import require
from .products import product
from .rules import always, rule
from .values import wide

SMALLEST_SUM = 1e-20  # of a token's shares, so that their quotient is a number
_WEIGHTS = (torch.bfloat16, torch.float32)
_FP32 = always(torch.float32)


@rule("kimi_linear", result=_FP32, floats=_WEIGHTS, widen=False)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [R, in] weight [out, in]^T (+ bias [out])."""
    require(
        x.ndim == weight.ndim == 2 and x.shape[1] == weight.shape[1],
        f"multiplies {list(x.shape)} by the transpose of {list(weight.shape)}",
    )
    y = product(x, weight.T)
    return y if bias is None else y + wide(bias)


@rule("kimi_linear_gelu_tanh", result=_FP32, floats=_WEIGHTS, widen=False)
def linear_gelu_tanh(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(linear(x, weight, bias), approximate="tanh")


@rule("kimi_linear_gelu_erf", result=_FP32, floats=_WEIGHTS, widen=False)
def linear_gelu_erf(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return F.gelu(linear(x, weight, bias))


@rule("kimi_embedding", result=_FP32, floats=_WEIGHTS, widen=False)
def embedding(table: Tensor, ids: Tensor) -> Tensor:
    """Rows of the table [V, H] for ids [R]."""
    _require_indices(ids, len(table), "ids")
    return wide(table[ids.long()])


@rule("kimi_rms_norm", result=_FP32, floats=_WEIGHTS)
def rms_norm(x: Tensor, weight: Tensor, eps: Tensor) -> Tensor:
    return norms.rms_norm(x, weight, eps.item())[0]


@rule("kimi_add_rms_norm", result=_FP32, floats=_WEIGHTS)
def add_rms_norm(x: Tensor, y: Tensor, weight: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """The sum, and its norm."""
    normed, _, total = norms.add_rms_norm(x, y, weight, eps.item())
    return total, normed


@rule("kimi_layer_norm", result=_FP32, floats=_WEIGHTS)
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: Tensor) -> Tensor:
    return F.layer_norm(x, weight.shape, weight, bias, eps.item())


@rule("kimi_add_layer_norm", result=_FP32, floats=_WEIGHTS)
def add_layer_norm(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: Tensor) -> tuple[Tensor, Tensor]:
    """The sum, and its norm."""
    total = x + y
    return total, layer_norm(total, weight, bias, eps)


@rule("kimi_split", result=_FP32, shaped=True)
def split(x: Tensor, shapes: tuple[tuple[int, ...], ...]) -> tuple[Tensor, ...]:
    """The last axis in two parts."""
    widths = [shape[-1] for shape in shapes]
    require(sum(widths) == x.shape[-1], f"splits {list(x.shape)} into parts of {widths}")
    return x.split(widths, -1)


@rule("kimi_rotate", result=_FP32)
def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [R, heads, D] with halves as pairs, cos and sin [R, D / 2]: (a, b) -> (a cos - b sin, b cos + a sin)."""
    require(
        x.ndim == 3 and cos.shape == sin.shape == (len(x), x.shape[-1] // 2),
        f"has tables {list(cos.shape)} and {list(sin.shape)} for {list(x.shape)}",
    )
    a, b = x.chunk(2, -1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@rule("kimi_swiglu", result=_FP32)
def swiglu(x: Tensor) -> Tensor:
    """silu(gate) up, of [R, 2 I] with gate's columns first."""
    gate, up = x.chunk(2, -1)
    return F.silu(gate) * up


@rule("kimi_interpolate", result=_FP32, floats=_WEIGHTS, widen=False)
def interpolate(table: Tensor, taps: Tensor, weights: Tensor) -> Tensor:
    """For each row of taps and weights [N, K], the weighted sum of K entries of the table [entries, D]."""
    require(taps.shape == weights.shape, f"has taps {list(taps.shape)} and weights {list(weights.shape)}")
    _require_indices(taps, len(table), "taps")
    return (weights[..., None] * wide(table[taps.long()])).sum(1)


@rule("kimi_router", result=always(torch.int32, torch.float32), floats=(torch.float32,), shaped=True)
def router(
    x: Tensor, weight: Tensor, bias: Tensor, options: Tensor, shapes: tuple[tuple[int, ...], ...]
) -> tuple[Tensor, Tensor]:
    """Of x [R, H]: the k experts with the largest sigmoid(x weight^T) + bias, and their shares [R, k], without the bias.

    `options`: whether shares are divided by their sum, and the factor that they are multiplied by then.
    """
    k = shapes[0][-1]
    require(k <= len(weight), f"chooses {k} of {len(weight)} experts")
    normalise, factor = options.tolist()
    scores = torch.sigmoid(x @ weight.T)
    chosen = torch.sort(scores + bias, dim=-1, descending=True, stable=True).indices[:, :k]
    shares = scores.gather(1, chosen)
    if normalise:
        shares = shares / (shares.sum(-1, keepdim=True) + SMALLEST_SUM)
    return chosen, shares * factor


@rule("kimi_experts", result=_FP32, floats=_WEIGHTS, widen=False)
def experts(x: Tensor, gate_up: Tensor, down: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """Each token of x [R, H] through its experts, which gate_up [E, H, 2 I] and down [E, I, H] stack.

    `indices` and `weights` [R, k]: the sum is weighted.
    """
    require(
        indices.shape == weights.shape and len(indices) == len(x),
        f"has indices {list(indices.shape)} and weights {list(weights.shape)} for {list(x.shape)}",
    )
    _require_indices(indices, len(gate_up), "indices")
    y = torch.zeros_like(x)
    for expert in indices.unique().tolist():
        tokens, places = torch.nonzero(indices == expert, as_tuple=True)
        given = swiglu(x[tokens] @ wide(gate_up[expert])) @ wide(down[expert])
        y.index_add_(0, tokens, weights[tokens, places, None] * given)
    return y


@rule("kimi_latent_attention", result=_FP32, floats=_WEIGHTS)
def latent_attention(
    q_nope: Tensor, q_rope: Tensor, cache: Tensor, start: Tensor, k_b: Tensor, v_b: Tensor
) -> Tensor:
    """Causal attention of T tokens, the first of which is in slot `start` [1], to the slots up to each token's own.

    q_nope [T, heads, nope] and q_rope [T, heads, rope], k_b [heads, nope, lora] and v_b [heads, value, lora]; a slot of
    the cache [S, lora + rope] is a latent and a rotated key -> [T, heads * value]. Later slots are not read.
    """
    tokens, first, lora = len(q_nope), int(start), k_b.shape[-1]
    require(
        cache.shape[1] == lora + q_rope.shape[-1],
        f"has a cache {list(cache.shape)} for latents of {lora} and keys of {q_rope.shape[-1]}",
    )
    require(
        first >= 0 and first + tokens <= len(cache),
        f"starts at {first} with {tokens} tokens in a cache of {len(cache)} slots",
    )
    latents, rope = cache[: first + tokens].split((lora, q_rope.shape[-1]), -1)
    keys = torch.cat((latents @ k_b.mT, rope.expand(len(k_b), -1, -1)), -1)  # (heads, slots, nope + rope)
    q = torch.cat((q_nope, q_rope), -1).transpose(0, 1)  # (heads, T, nope + rope)
    later = torch.arange(first + tokens) > first + torch.arange(tokens)[:, None]
    return _attended(q, keys, latents @ v_b.mT, later)


@rule("kimi_vision_attention", "kimi_vision_attention_rounded", result=_FP32)
def vision_attention(qkv: Tensor, cos: Tensor, sin: Tensor, valid: Tensor) -> Tensor:
    """The first `valid` [1] patches attend to each other -> [N, heads * D]; the rest is padding, and 0.

    qkv [N, 3 * heads * D]; the queries and keys are rotated, see :func:`rotate`.
    """
    seen = int(valid)
    require(0 < seen <= len(qkv), f"has {seen} valid patches of {len(qkv)}")
    width = 6 * cos.shape[-1]
    require(
        qkv.shape[-1] % width == 0,
        f"has tables {list(cos.shape)} for queries, keys and values {list(qkv.shape)}",
    )
    q, k, v = (part.unflatten(-1, (-1, 2 * cos.shape[-1])) for part in qkv.chunk(3, -1))
    queries, keys, values = (t[:seen].transpose(0, 1) for t in (rotate(q, cos, sin), rotate(k, cos, sin), v))
    y = _attended(queries, keys, values, torch.zeros(1, dtype=torch.bool))
    return F.pad(y, (0, 0, 0, len(qkv) - seen))


def _attended(q: Tensor, keys: Tensor, values: Tensor, hidden: Tensor) -> Tensor:
    """[heads, T, D], [heads, S, D], [heads, S, V] and the places that are not seen [T, S] -> [T, heads * V], head by head."""
    heads = []
    for one, k, v in zip(q, keys, values):
        scores = (one @ k.T / q.shape[-1] ** 0.5).masked_fill(hidden, -torch.inf)
        heads.append(scores.softmax(-1) @ v)
    return torch.cat(heads, -1)


def _require_indices(indices: Tensor, count: int, what: str) -> None:
    require(
        indices.dtype == torch.int32 and bool(((indices >= 0) & (indices < count)).all()),
        f"has {what} that are not int32 from 0 to {count - 1}",
    )
