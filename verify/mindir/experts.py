"""Tokens to their experts and back."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import require
from .rules import FLOATS, rule
from .values import Value, wide

UNDEFINED = torch.iinfo(torch.int32).min
"""Content of integer outputs that the operator leaves as memory happens to be."""


def _ranks(experts: Tensor) -> tuple[Tensor, Tensor]:
    """Of a flat list of experts: the order that sorts it, equal ones as they were, and each element's place in it."""
    order = torch.argsort(experts, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(order))
    return order, rank


def _routed(x: Value, *_: Any) -> tuple[torch.dtype, ...]:
    return x.dtype, torch.int32, torch.int32, torch.int32


@rule("MoeInitRoutingV2", widen=False, result=_routed, floats=FLOATS)
def moe_init_routing_v2(
    x: Tensor,
    expert_idx: Tensor,
    active_num: int,
    expert_capacity: int,
    expert_num: int,
    drop_pad_mode: int,
    count_flag: int,
    before_capacity_flag: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of x [T, H] sorted by the experts of expert_idx [T, K].

    Gives expanded_x, where row i belongs to element order[i] of the flat expert_idx; expanded_row_idx [T * K], each
    element's row in it; tokens per expert (flag 2) or their cumulative sum (flag 1). With drop_pad_mode 1 an expert
    has `expert_capacity` rows [E, capacity, H]: further tokens are dropped (-1), rows that are left are 0.
    """
    require(
        x.ndim == expert_idx.ndim == 2 and len(x) == len(expert_idx), "takes x [T, H] and expert_idx [T, K]"
    )
    require(expert_idx.dtype == torch.int32, "has an expert_idx that is not int32")
    require(
        drop_pad_mode in (0, 1) and count_flag in (0, 1, 2),
        f"has drop_pad_mode {drop_pad_mode}, flag {count_flag}",
    )
    experts = expert_idx.reshape(-1).long()
    require(
        bool((experts >= 0).all()) and bool((experts < expert_num).all()),
        f"has experts outside 0 to {expert_num - 1}",
    )
    order, rank = _ranks(experts)
    counts = torch.bincount(experts, minlength=expert_num)
    dirty = torch.full((expert_num,), UNDEFINED, dtype=torch.int32)
    if drop_pad_mode == 0:
        require(active_num == 0, f"has active_num {active_num}; only 0, dropless, is supported")
        numbers = {0: dirty, 1: counts.cumsum(0), 2: counts}[count_flag]
        return x[order // expert_idx.shape[1]], rank, numbers, dirty
    require(0 < expert_capacity <= len(x), f"has expert_capacity {expert_capacity}, expected 1 to {len(x)}")
    within = rank - (counts.cumsum(0) - counts)[experts]  # place among the tokens of its expert
    kept = within < expert_capacity
    places = torch.where(kept, experts * expert_capacity + within, -1)
    out = x.new_zeros(expert_num * expert_capacity, x.shape[1])
    out[places[kept]] = x[torch.arange(len(experts))[kept] // expert_idx.shape[1]]
    before = counts if before_capacity_flag else dirty
    return out.reshape(expert_num, expert_capacity, -1), places, dirty, before


@rule("MoeTokenPermute", widen=False, result=lambda x, *_: (x.dtype, torch.int32), floats=FLOATS)
def moe_token_permute(
    tokens: Tensor, indices: Tensor, num_out_tokens: int | None, padded_mode: bool
) -> tuple[Tensor, Tensor]:
    """Tokens [T, H] sorted by indices [T, K] or [T], and the row of each element of indices."""
    require(not padded_mode, "has padded_mode")
    require(indices.dtype in (torch.int32, torch.int64), "has indices that are not int32 or int64")
    require(
        tokens.ndim == 2 and indices.ndim in (1, 2) and len(tokens) == len(indices), "takes [T, H] and [T, K]"
    )
    top = indices.shape[1] if indices.ndim == 2 else 1
    require(top <= 512, f"has {top} indices a token, expected at most 512")
    order, rank = _ranks(indices.reshape(-1))
    require(num_out_tokens is None or num_out_tokens >= 0, f"gives {num_out_tokens} tokens")
    return tokens[order // top][:num_out_tokens], rank


@rule("MoeTokenUnpermute", "InnerMoeTokenUnpermute", widen=False, result=lambda y, *_: y.dtype, floats=FLOATS)
def moe_token_unpermute(
    y: Tensor, indices: Tensor, probs: Tensor | None, padded_mode: bool, restore_shape: Any
) -> Tensor:
    """out[t] = sum over j of y[indices[t * K + j]] * probs[t, j]; without probs, K = 1 and a factor of 1."""
    require(not padded_mode, "has padded_mode")
    require(
        indices.dtype == torch.int32 and indices.ndim == 1, "has indices that are not int32 of one dimension"
    )
    require(
        len(indices) == len(y) == len(indices.unique()), "has indices that are not a permutation of its rows"
    )
    require(int(indices.min()) >= 0 and int(indices.max()) < len(y), f"has indices outside 0 to {len(y) - 1}")
    rows = y[indices.long()]
    if probs is None:
        return rows
    require(
        probs.ndim == 2 and probs.numel() == len(rows), f"has probs {list(probs.shape)} for {len(rows)} rows"
    )
    require(probs.shape[1] <= 512, f"has {probs.shape[1]} rows a token, expected at most 512")
    return (wide(rows).unflatten(0, tuple(probs.shape)) * wide(probs)[..., None]).sum(1)
