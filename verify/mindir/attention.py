"""The fused attention operators: Softmax(scale * Q K^T, mask) V, in the layouts and with the limits of each.

What no docstring defines is NaN, so that its use shows: queries outside the actual lengths, and those whose keys are all
masked where the operator does not correct them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import masks
from .errors import require
from .rules import common, rule
from .values import LOW, Value

_LAYOUTS = {0: "BSH", 1: "BNSD", 2: "SBH", 3: "BSND", 8: "BNSD_BSND"}  # what the front end makes of the words
_LARGEST_DIM = 512
_PADDING = 8  # FusedInferAttentionScore: the place of query_padding_size among what follows the lengths


class _Layout:
    """How queries and keys lie in memory; inside it is always [B, N, S, D]."""

    def __init__(self, number: int, supported: Sequence[str]) -> None:
        self.name = _LAYOUTS.get(number, f"number {number}")
        require(self.name in supported, f"has the layout {self.name}, expected {', '.join(supported)}")

    def heads_first(self, x: Tensor, heads: int) -> Tensor:
        """To [B, N, S, D]."""
        require(
            x.ndim == (3 if self.name in ("BSH", "SBH") else 4),
            f"has {list(x.shape)} in the layout {self.name}",
        )
        if self.name == "SBH":
            x = x.transpose(0, 1)
        if x.ndim == 3:
            require(x.shape[2] % heads == 0, f"splits {x.shape[2]} numbers into {heads} heads")
            x = x.unflatten(2, (heads, -1)).transpose(1, 2)
        elif self.name == "BSND":
            x = x.transpose(1, 2)
        require(x.shape[1] == heads, f"has {x.shape[1]} heads, expected {heads}")
        return x

    def back(self, x: Tensor) -> Tensor:
        """From [B, N, S, D] to the output's layout."""
        if self.name == "BNSD":
            return x
        x = x.transpose(1, 2)
        if self.name in ("BSND", "BNSD_BSND"):
            return x
        x = x.flatten(2)
        return x.transpose(0, 1) if self.name == "SBH" else x


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    mask: Tensor | None,
    queries: Sequence[range],
    keys: Sequence[range],
    corrected: bool,
) -> Tensor:
    """[B, N, S1, D], [B, Nkv, S2, D], [B, Nkv, S2, Dv] -> [B, N, S1, Dv]; keys outside a row's span are never read."""
    shared = q.shape[1] // k.shape[1]
    out = q.new_full((*q.shape[:3], v.shape[3]), torch.nan)
    for b, (ours, theirs) in enumerate(zip(queries, keys)):
        if not ours:
            continue
        rows, columns = slice(ours.start, ours.stop), slice(theirs.start, theirs.stop)
        discard = None if mask is None else mask[b, :, rows, columns].expand(q.shape[1], -1, -1)
        for h in range(q.shape[1]):
            score = q[b, h, rows] @ k[b, h // shared, columns].T * scale
            if discard is not None:
                score = score.masked_fill(discard[h], -math.inf)
            row = torch.softmax(score, -1) @ v[b, h // shared, columns]
            if corrected and discard is not None:
                row = row.masked_fill(discard[h].all(-1, keepdim=True), 0)
            out[b, h, rows] = row if theirs else 0 if corrected else torch.nan
    return out


def _inputs(
    layout: _Layout, q: Tensor, k: Tensor, v: Tensor, heads: int, kv_heads: int, same_dim: bool = True
) -> tuple[Tensor, Tensor, Tensor]:
    kv_heads = kv_heads or heads
    require(heads > 0 and heads % kv_heads == 0, f"has {heads} heads for {kv_heads} of keys")
    require(
        heads <= 256 and heads // kv_heads <= 64,
        f"has {heads} heads for {kv_heads} of keys, expected at most 256 and 64 for each",
    )
    q, k, v = layout.heads_first(q, heads), layout.heads_first(k, kv_heads), layout.heads_first(v, kv_heads)
    require(len(q) == len(k) == len(v), f"has {len(q)}, {len(k)} and {len(v)} rows of q, k and v")
    require(k.shape[2] == v.shape[2], f"has {k.shape[2]} keys and {v.shape[2]} values")
    require(q.shape[3] == k.shape[3], f"has head dims {q.shape[3]} of q and {k.shape[3]} of k")
    require(
        not same_dim or k.shape == v.shape,
        f"has head dims {k.shape[3]} of k and {v.shape[3]} of v, expected one",
    )
    require(q.shape[3] <= _LARGEST_DIM, f"has head dim {q.shape[3]}, expected at most {_LARGEST_DIM}")
    return q, k, v


def _aligned(q: Tensor) -> None:
    require(q.shape[3] % 16 == 0, f"has head dim {q.shape[3]}, expected a multiple of 16")


def _one(tensors: Any, what: str) -> Tensor:
    require(isinstance(tensors, tuple) and len(tensors) == 1, f"has no single {what}")
    return tensors[0]


def _kv_dtype(q: Value, k: Any, v: Any, *_: Any) -> torch.dtype:
    return common(q, *(k if isinstance(k, tuple) else (k,)), *(v if isinstance(v, tuple) else (v,)))


@rule("FusedInferAttentionScore", floats=LOW, result=lambda *a: (_kv_dtype(*a), torch.float32))
def fused_infer_attention_score(
    query: Tensor,
    key: tuple[Tensor, ...],
    value: tuple[Tensor, ...],
    pse_shift: Any,
    attn_mask: Tensor | None,
    actual_seq_lengths: Any,
    actual_seq_lengths_kv: Any,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    """One query (S1 = 1) or a prompt. `arguments`: 17 of quantisation, pages, padding and prefixes, then 13 settings.

    With one query its length, the window and sparse_mode are ignored, and inner_precise is 0 or 1. Rows without a key
    are corrected in sparse_mode 3 by itself. Left padding of one query's keys is refused: the documents contradict
    each other about it.
    """
    optional, settings = arguments[:17], arguments[17:]
    query_padding, key_padding = optional[_PADDING : _PADDING + 2]
    others = (pse_shift, *optional[:_PADDING], *optional[_PADDING + 2 :])
    require(all(a is None for a in others), "has arguments beyond mask, lengths and padding")
    heads, scale, before, after, layout_id, kv_heads, sparse_mode, inner_precise, *rest = settings
    block_size, antiquant, lse, *modes = rest
    require(
        block_size == 0 and antiquant == 0 and not lse and not any(modes),
        "has pages, quantisation or a softmax_lse",
    )
    layout = _Layout(layout_id, ("BSH", "BNSD", "BSND", "BNSD_BSND"))
    q, k, v = _inputs(layout, query, _one(key, "key"), _one(value, "value"), heads, kv_heads)
    batch, _, s1, _ = q.shape
    s2 = k.shape[2]
    keys = masks.spans(actual_seq_lengths_kv, key_padding, batch, s2, "lengths of keys")
    if s1 == 1:
        require(layout.name != "BNSD_BSND", "has the layout BNSD_BSND for one query")
        require(inner_precise in (0, 1), f"has inner_precise {inner_precise} for one query, expected 0 or 1")
        require(key_padding is None, "has kv_padding_size for one query, which is not supported")
        mask, queries = masks.of_one_query(attn_mask, batch, s2), [range(1)] * batch
    else:
        _aligned(q)
        require(inner_precise in (0, 1, 2, 3), f"has inner_precise {inner_precise}, expected 0 to 3")
        queries = masks.spans(actual_seq_lengths, query_padding, batch, s1, "lengths of queries")
        padded = query_padding is not None or key_padding is not None
        mask = masks.of_prompt(attn_mask, sparse_mode, before, after, queries, keys, s1, s2, padded)
    corrected = inner_precise >= 2 or (s1 > 1 and sparse_mode == masks.RIGHT_DOWN_CAUSAL)
    out = _attend(q, k, v, scale, mask, queries, keys, corrected)
    return layout.back(out), torch.zeros(1)


@rule("PromptFlashAttention", floats=LOW, result=_kv_dtype)
def prompt_flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    actual_seq_lengths: Any,
    actual_seq_lengths_kv: Any,
    pse_shift: Any,
    deq_scale1: Any,
    quant_scale1: Any,
    deq_scale2: Any,
    quant_scale2: Any,
    quant_offset2: Any,
    heads: int,
    scale: float,
    before: int,
    after: int,
    layout_id: int,
    kv_heads: int,
    sparse_mode: int,
    inner_precise: int,
) -> Tensor:
    extras = (pse_shift, deq_scale1, quant_scale1, deq_scale2, quant_scale2, quant_offset2)
    require(all(e is None for e in extras), "has arguments beyond mask and lengths")
    require(inner_precise in (0, 1), f"has inner_precise {inner_precise}, expected 0 or 1")
    layout = _Layout(layout_id, ("BSH", "BNSD"))
    q, k, v = _inputs(layout, query, key, value, heads, kv_heads)
    _aligned(q)
    batch, _, s1, _ = q.shape
    s2 = k.shape[2]
    queries = masks.spans(actual_seq_lengths, None, batch, s1, "lengths of queries")
    keys = masks.spans(actual_seq_lengths_kv, None, batch, s2, "lengths of keys")
    mask = masks.of_prompt(attn_mask, sparse_mode, before, after, queries, keys, s1, s2)
    corrected = sparse_mode == masks.RIGHT_DOWN_CAUSAL
    return layout.back(_attend(q, k, v, scale, mask, queries, keys, corrected))


@rule("IncreFlashAttention", floats=LOW, result=_kv_dtype)
def incre_flash_attention(
    query: Tensor,
    key: tuple[Tensor, ...],
    value: tuple[Tensor, ...],
    attn_mask: Tensor | None,
    actual_seq_lengths: Any,
    *arguments: Any,
) -> Tensor:
    """One query a row. `arguments`: 10 of shift, quantisation, pages and padding, then 6 settings; lengths are the keys'."""
    optional, settings = arguments[:10], arguments[10:]
    require(all(a is None for a in optional), "has arguments beyond mask and lengths")
    heads, layout_id, scale, kv_heads, block_size, _ = settings
    require(block_size == 0, "has pages")
    layout = _Layout(layout_id, ("BSH", "BNSD"))
    q, k, v = _inputs(layout, query, _one(key, "key"), _one(value, "value"), heads, kv_heads)
    require(q.shape[2] == 1, f"has {q.shape[2]} queries a row, expected 1")
    batch, s2 = len(q), k.shape[2]
    lengths = actual_seq_lengths
    if isinstance(lengths, Tensor) and lengths.dtype == torch.int32:  # this operator takes both
        lengths = lengths.long()
    mask = masks.of_one_query(attn_mask, batch, s2)
    keys = masks.spans(lengths, None, batch, s2, "lengths of keys")
    return layout.back(_attend(q, k, v, scale, mask, [range(1)] * batch, keys, corrected=False))


@rule(
    "FlashAttentionScore",
    floats=LOW,
    result=lambda *a: (torch.float32, torch.float32, _kv_dtype(*a), _kv_dtype(*a)),
)
def flash_attention_score(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    real_shift: Any,
    drop_mask: Any,
    padding_mask: Any,
    attn_mask: Tensor | None,
    prefix: Any,
    actual_seq_qlen: Any,
    actual_seq_kvlen: Any,
    heads: int,
    keep_prob: float,
    scale: float,
    before: int,
    after: int,
    inner_precise: int,
    layout_id: int,
    sparse_mode: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gives softmax_max and softmax_sum [B, N, S1, 8], one that is useless, and the attention.

    Values may be shorter than keys, which aclnnFlashAttentionScore allows. The docstring and its formula disagree with
    the other operators' about the place of the scale beside real_shift, so that is not supported.
    """
    extras = (real_shift, drop_mask, padding_mask, prefix, actual_seq_qlen, actual_seq_kvlen)
    require(all(e is None for e in extras) and keep_prob == 1, "has a shift, dropout, a prefix or lengths")
    require(inner_precise == 0, f"has inner_precise {inner_precise}, which is reserved, expected 0")
    layout = _Layout(layout_id, ("BSH", "BNSD", "SBH", "BSND"))
    kv_heads = _kv_heads(layout, query, key, heads)
    q, k, v = _inputs(layout, query, key, value, heads, kv_heads, same_dim=False)
    require(v.shape[3] <= k.shape[3], f"has head dim {v.shape[3]} of v, expected at most {k.shape[3]}")
    batch, _, s1, _ = q.shape
    s2 = k.shape[2]
    require(
        sparse_mode in (0, 1), f"has sparse_mode {sparse_mode}; only 0 and 1, a whole mask, are supported"
    )
    require(
        attn_mask is None or sparse_mode == 1 or min(before, after) >= masks.WHOLE,
        "has a window beside its mask",
    )
    require(attn_mask is None or attn_mask.dtype != torch.int8, "has a mask in int8, expected bool or uint8")
    shapes: list[tuple[int, ...]] = [(batch, heads, s1, s2), (batch, 1, s1, s2), (s1, s2)]
    mask = masks.expanded(attn_mask, shapes, (batch, 1, s1, s2))
    out = _attend(q, k, v, scale, mask, [range(s1)] * batch, [range(s2)] * batch, corrected=False)
    score = q @ k.repeat_interleave(heads // kv_heads, 1).mT * scale
    if mask is not None:
        score = score.masked_fill(mask, -math.inf)
    top = score.amax(-1, keepdim=True)
    total = (score - top).exp().sum(-1, keepdim=True)
    useless = torch.full((1,), torch.nan)
    return top.expand(-1, -1, -1, 8), total.expand(-1, -1, -1, 8), useless, layout.back(out)


def _kv_heads(layout: _Layout, query: Tensor, key: Tensor, heads: int) -> int:
    """Heads of keys, which this operator takes from the shapes."""
    if layout.name in ("BNSD", "BSND"):
        return key.shape[1 if layout.name == "BNSD" else 2]
    require(
        key.shape[2] * heads % query.shape[2] == 0,
        f"has keys of {key.shape[2]} for queries of {query.shape[2]}",
    )
    return key.shape[2] * heads // query.shape[2]
