"""Which keys a query of a fused attention sees: lengths, padding on either side, masks and sparse modes.

MindSpore's docstrings and CANN's aclnn documents say what the modes mean; where the triangle of modes 3 and 4 hangs (at
the end of the *actual* lengths) follows from the limits that these give for rows without a key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import require
from .values import name

WHOLE = 2147483647  # tokens before and after that are attended: all of them
TRIANGLE = 2048  # rows and columns of the mask that modes 2 to 4 take, whatever the lengths
LEFT_UP_CAUSAL, RIGHT_DOWN_CAUSAL, BAND = 2, 3, 4
_DTYPES = (torch.bool, torch.int8, torch.uint8)


def lengths(given: Any, batch: int, limit: int, what: str) -> list[int]:
    """One number for each row, or one for all; None: everything."""
    if given is None:
        return [limit] * batch
    if isinstance(given, Tensor):
        require(given.dtype == torch.int64, f"has {what} in {name(given.dtype)}, expected int64")
        given = given.reshape(-1).tolist()
    numbers = list(given)
    require(len(numbers) in (1, batch), f"has {len(numbers)} {what} for a batch of {batch}")
    require(all(0 <= n <= limit for n in numbers), f"has {what} {numbers}, expected 0 to {limit}")
    return numbers * batch if len(numbers) == 1 else numbers


def spans(given: Any, padding: Tensor | None, batch: int, limit: int, what: str) -> list[range]:
    """The places of each row that hold something: from 0 on, or, with `padding`, up to that many before the end.

    Padding counts only beside lengths; a negative one is 0.
    """
    found = lengths(given, batch, limit, what)
    if padding is None or given is None:
        return [range(n) for n in found]
    require(
        padding.dtype == torch.int64 and padding.numel() == 1, "has a padding that is not one number in int64"
    )
    end = limit - max(0, int(padding))
    require(
        end >= max(found, default=0), f"has {limit - end} padded places and {what} {found}, expected {limit}"
    )
    return [range(end - n, end) for n in found]


def expanded(
    mask: Tensor | None, shapes: Sequence[tuple[int, ...]], target: tuple[int, ...]
) -> Tensor | None:
    """True = discard, as [B, N or 1, S1, S2] of `target`; `shapes` are those that the operator takes."""
    if mask is None:
        return None
    require(mask.dtype in _DTYPES, f"has a mask in {name(mask.dtype)}, expected bool, int8 or uint8")
    require(
        tuple(mask.shape) in shapes,
        f"has the mask {list(mask.shape)}, expected one of {list(map(list, shapes))}",
    )
    while mask.ndim < 4:  # [S1, S2] or [B, S1, S2]
        mask = mask.unsqueeze(0 if mask.ndim == 2 else 1)
    return mask.bool().expand(target[0], -1, target[2], target[3])


def of_one_query(mask: Tensor | None, batch: int, s2: int) -> Tensor | None:
    shapes: list[tuple[int, ...]] = [(batch, s2), (batch, 1, s2), (batch, 1, 1, s2)]
    if mask is not None:
        require(
            tuple(mask.shape) in shapes,
            f"has the mask {list(mask.shape)}, expected one of {list(map(list, shapes))}",
        )
        mask = mask.reshape(batch, 1, 1, s2)
    return expanded(mask, [(batch, 1, 1, s2)], (batch, 1, 1, s2))


def of_prompt(
    mask: Tensor | None,
    sparse_mode: int,
    before: int,
    after: int,
    queries: Sequence[range],
    keys: Sequence[range],
    s1: int,
    s2: int,
    left_padded: bool = False,
) -> Tensor | None:
    """[B, 1, S1, S2], True = discard, by places in memory.

    Modes 0 and 1 take a whole mask; the window counts in mode 0 alone, and not beside a mask of left padded rows.
    Modes 2 to 4 take a fixed triangle, which says that they are wanted, and hide by position within each row: later
    keys than the query's (2), the same with the last query at the last key (3), all but a window around that (4).
    """
    require(sparse_mode in range(5), f"has sparse_mode {sparse_mode}, expected 0 to 4")
    batch = len(queries)
    if sparse_mode in (LEFT_UP_CAUSAL, RIGHT_DOWN_CAUSAL, BAND):
        _require_triangle(mask, sparse_mode)
        return torch.stack([_banded(sparse_mode, before, after, q, k, s1, s2) for q, k in zip(queries, keys)])
    require(mask is not None or sparse_mode == 0, "has sparse_mode 1 and no mask")
    require(
        mask is None or sparse_mode == 1 or left_padded or min(before, after) >= WHOLE,
        f"has a window of {before} and {after} tokens beside its mask; only {WHOLE} is supported",
    )
    leading: list[tuple[int, ...]] = [(), (batch,), (1,), (batch, 1), (1, 1)]
    return expanded(mask, [(*lead, s1, s2) for lead in leading], (batch, 1, s1, s2))


def _require_triangle(mask: Tensor | None, sparse_mode: int) -> None:
    shapes = [(*lead, TRIANGLE, TRIANGLE) for lead in ((), (1,), (1, 1))]
    given = None if mask is None else list(mask.shape)
    require(
        mask is not None and mask.dtype in _DTYPES and tuple(mask.shape) in shapes,
        f"has sparse_mode {sparse_mode} and the mask {given}, expected {[TRIANGLE, TRIANGLE]} in bool, int8 or uint8",
    )
    assert mask is not None
    wanted = torch.ones(TRIANGLE, TRIANGLE, dtype=torch.bool).triu(1)
    require(
        bool((mask.reshape(wanted.shape).bool() == wanted).all()),
        f"has sparse_mode {sparse_mode} and a mask that is not 1 above its diagonal and 0 elsewhere",
    )


def _banded(
    sparse_mode: int, before: int, after: int, queries: range, keys: range, s1: int, s2: int
) -> Tensor:
    """[1, S1, S2] of one row."""
    shift = 0 if sparse_mode == LEFT_UP_CAUSAL else len(keys) - len(queries)
    own = torch.arange(s1)[:, None] - queries.start + shift  # the key at each query's own position
    key = torch.arange(s2)[None] - keys.start
    if sparse_mode == BAND:
        return ((key > own + after) | (key < own - before))[None]
    return (key > own)[None]
