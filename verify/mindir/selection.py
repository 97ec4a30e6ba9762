"""Elements by index or by rank: gather, one-hot, sort, top-k; and writes into a parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import require
from .rules import common, first, rule
from .values import Value, name

_INDEX = (torch.int32, torch.int64)
UPDATE = 3  # of KVCacheScatterUpdate's `reduce`; the front end makes a number of the word


def _indices(indices: Tensor, n: int) -> Tensor:
    """As Torch wants them. Outside [0, n) MindSpore's result is undefined, so that is refused."""
    require(indices.dtype in _INDEX, f"has {name(indices.dtype)} indices, expected int32 or int64")
    if indices.numel():
        low, high = int(indices.min()), int(indices.max())
        require(low >= 0 and high < n, f"has indices from {low} to {high}, expected 0 to {n - 1}")
    return indices.long()


@rule("Gather", widen=False, result=first)
def gather(x: Tensor, indices: Tensor, axis: int, batch_dims: int) -> Tensor:
    """Slices of x along `axis`, in indices' shape."""
    require(batch_dims == 0, f"has batch_dims {batch_dims}, expected 0")
    axis %= x.ndim
    taken = x.index_select(axis, _indices(indices, x.shape[axis]).reshape(-1))
    return taken.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


@rule("GatherD", widen=False, result=first)
def gather_d(x: Tensor, axis: int, indices: Tensor) -> Tensor:
    return x.gather(axis, _indices(indices, x.shape[axis]))


@rule("IndexSelect", widen=False, result=first)
def index_select(x: Tensor, axis: int, indices: Tensor) -> Tensor:
    require(indices.ndim == 1, f"has indices of {indices.ndim} dimensions, expected 1")
    return x.index_select(axis, _indices(indices, x.shape[axis]))


@rule("Embedding", widen=False, result=lambda ids, table, *_: table.dtype)
def embedding(
    ids: Tensor,
    table: Tensor,
    padding: int | None,
    max_norm: float | None,
    norm_type: float,
    by_frequency: bool,
) -> Tensor:
    require(max_norm is None, "renormalises its table")
    return table[_indices(ids, len(table))]


@rule("OneHot", "OneHotExt", result=lambda indices, depth, on, off, axis: common(on, off))
def one_hot(indices: Tensor, depth: int, on: Tensor, off: Tensor, axis: int) -> Tensor:
    """`on` at the index along a new axis, `off` elsewhere and everywhere for an index outside [0, depth)."""
    axis = axis if axis >= 0 else indices.ndim
    places = torch.arange(depth).reshape(-1, *[1] * (indices.ndim - axis))
    return torch.where(indices.unsqueeze(axis) == places, on, off)


# By rank -------------------------------------------------------------------------------------------------------------


def _top(x: Tensor, k: int, axis: int, largest: bool) -> tuple[Tensor, Tensor]:
    """Of equal elements the one with the smaller index comes first."""
    require(0 < k <= x.shape[axis], f"takes the first {k} of {x.shape[axis]}")
    values, order = x.sort(dim=axis, descending=largest, stable=True)
    return values.narrow(axis, 0, k), order.narrow(axis, 0, k)


def _ranked(indices: torch.dtype) -> Any:
    return lambda x, *_: (x.dtype, indices)


@rule("TopK", result=_ranked(torch.int32), attributes=("sorted",), widen=False)
def top_k(x: Tensor, k: int, sorted: bool) -> tuple[Tensor, Tensor]:
    """The k largest along the last axis."""
    require(sorted, "is not sorted, so its order is undefined")
    return _top(x, k, -1, largest=True)


@rule("TopkExt", result=_ranked(torch.int64), widen=False)
def topk_ext(x: Tensor, k: int, axis: int, largest: bool, sorted: bool) -> tuple[Tensor, Tensor]:
    require(sorted, "is not sorted, so its order is undefined")
    return _top(x, k, axis, largest)


@rule("Sort", result=_ranked(torch.int32), attributes=("axis", "descending"), widen=False)
def sort(x: Tensor, axis: int, descending: bool) -> tuple[Tensor, Tensor]:
    """Equal elements keep their order here; the docstring does not say that they do."""
    return x.sort(dim=axis, descending=descending, stable=True)


@rule("SortExt", result=_ranked(torch.int64), widen=False)
def sort_ext(x: Tensor, axis: int, descending: bool, stable: bool) -> tuple[Tensor, Tensor]:
    return x.sort(dim=axis, descending=descending, stable=True)


# Into a parameter ----------------------------------------------------------------------------------------------------


def _written(target: Value, *arguments: Any) -> torch.dtype:
    updates = [a for a in arguments if isinstance(a, Value) and a.dtype not in _INDEX]
    return common(target, *updates)


def _copy(target: Tensor, updates: Tensor) -> Tensor:
    """The parameter's content, to be changed, held as wide as what is written into it."""
    return target.to(torch.promote_types(target.dtype, updates.dtype), copy=True)


@rule("Assign", widen=False, writes=True, result=_written)
def assign(target: Tensor, value: Tensor) -> Tensor:
    require(target.shape == value.shape, f"assigns {list(value.shape)} to {list(target.shape)}")
    return value.clone()


@rule("ScatterUpdate", widen=False, writes=True, result=_written)
def scatter_update(target: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """target[indices] = updates."""
    shape = (*indices.shape, *target.shape[1:])
    require(tuple(updates.shape) == shape, f"has updates {list(updates.shape)}, expected {list(shape)}")
    index = _indices(indices, len(target)).reshape(-1)
    require(len(index.unique()) == len(index), "writes one place twice, in an order that is undefined")
    out = _copy(target, updates)
    out[index] = updates.reshape(-1, *target.shape[1:]).to(out.dtype)
    return out


@rule("ScatterNdUpdate", widen=False, writes=True, result=_written)
def scatter_nd_update(target: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    """The last axis of indices addresses the first axes of target."""
    depth = indices.shape[-1]
    shape = (*indices.shape[:-1], *target.shape[depth:])
    require(tuple(updates.shape) == shape, f"has updates {list(updates.shape)}, expected {list(shape)}")
    index = tuple(_indices(indices[..., d], target.shape[d]).reshape(-1) for d in range(depth))
    places = torch.stack(index, 1)
    require(len(places.unique(dim=0)) == len(places), "writes one place twice, in an order that is undefined")
    out = _copy(target, updates)
    out[index] = updates.reshape(-1, *target.shape[depth:]).to(out.dtype)
    return out


@rule("InplaceIndexCopy", widen=False, writes=True, result=_written)
def index_copy(target: Tensor, axis: int, indices: Tensor, updates: Tensor) -> Tensor:
    """Slices of updates along `axis` to the places `indices`."""
    require(indices.ndim == 1, f"has indices of {indices.ndim} dimensions, expected 1")
    index = _indices(indices, target.shape[axis])
    require(len(index.unique()) == len(index), "writes one place twice, in an order that is undefined")
    out = _copy(target, updates)
    return out.index_copy(axis, index, updates.to(out.dtype))


@rule("KVCacheScatterUpdate", widen=False, writes=True, result=_written)
def kv_cache_scatter_update(target: Tensor, start: Tensor, updates: Tensor, axis: int, reduce: int) -> Tensor:
    """target [B, N, S, D]: in row b, as many slots of `axis` as updates has, from start[b] on.

    CANN's aclnnInplaceScatterUpdate: data[i][j][start[i] + k] = updates[i][j][k], no index below 0 or past the end.
    """
    require(reduce == UPDATE, f"has reduce {reduce}, expected {UPDATE} (update)")
    require(
        target.ndim == updates.ndim == 4,
        f"takes {list(target.shape)} and {list(updates.shape)}, expected 4 dimensions",
    )
    require(axis in (-1, -2), f"has axis {axis}, expected -1 or -2")
    require(
        start.dtype in _INDEX and start.shape == (len(target),),
        f"has starts {list(start.shape)}, expected one a row",
    )
    wanted = list(target.shape)
    wanted[axis] = updates.shape[axis]
    require(list(updates.shape) == wanted, f"has updates {list(updates.shape)}, expected {wanted}")
    out = _copy(target, updates)
    slots, n = target.shape[axis], updates.shape[axis]
    for row, at in enumerate(start.tolist()):
        require(at >= 0 and at + n <= slots, f"writes slots {at} to {at + n} of {slots}")
        out[row].narrow(axis, at, n).copy_(updates[row])
    return out
