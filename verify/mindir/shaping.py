"""Operators that move elements and compute nothing: shapes, slices, parts put together. Low precision stays as it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import require
from .rules import common, first, rule
from .values import Value


def _joined(parts: tuple[Value, ...], *_: Any) -> torch.dtype:
    return common(*parts)


@rule("Reshape", widen=False, result=first)
def reshape(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.reshape(shape)


@rule("Transpose", widen=False)
def transpose(x: Tensor, order: tuple[int, ...]) -> Tensor:
    require(
        sorted(d % x.ndim for d in order) == list(range(x.ndim)),
        f"has the order {order} for {x.ndim} dimensions",
    )
    return x.permute(order)


@rule("ExpandDims", "ExpandDimsView", widen=False)
def expand_dims(x: Tensor, axis: int) -> Tensor:
    return x.unsqueeze(axis)


@rule("Squeeze", widen=False)
def squeeze(x: Tensor, axes: tuple[int, ...]) -> Tensor:
    axes = axes or tuple(d for d, n in enumerate(x.shape) if n == 1)
    require(
        all(x.shape[d] == 1 for d in axes), f"leaves out axes {axes} of {list(x.shape)}, which are not all 1"
    )
    return x.squeeze(axes)


@rule("BroadcastTo", widen=False)
def broadcast_to(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    return x.expand(shape)


@rule("ConstantPadND", widen=False)
def constant_pad_nd(x: Tensor, padding: tuple[int, ...], value: float) -> Tensor:
    """Pairs of counts, before and after, from the last axis on."""
    require(
        len(padding) % 2 == 0 and len(padding) <= 2 * x.ndim, f"has the padding {padding} for {x.ndim} axes"
    )
    require(min(padding, default=0) >= 0, f"has the padding {padding}; negative counts are not supported")
    return F.pad(x, padding, value=value)


@rule("Pad", widen=False, attributes=("paddings",))
def pad(x: Tensor, paddings: tuple[tuple[int, int], ...]) -> Tensor:
    """Zeros, as many before and after as a pair for each axis says, from the first axis on."""
    require(len(paddings) == x.ndim, f"has the paddings {paddings} for {x.ndim} axes")
    require(
        min(n for pair in paddings for n in pair) >= 0, f"has the paddings {paddings}, expected none below 0"
    )
    return F.pad(x, [n for pair in reversed(paddings) for n in pair])


@rule("Tile", widen=False)
def tile(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    require(all(d > 0 for d in dims), f"repeats {dims} times, expected positive numbers")
    return x.tile(dims)


@rule("Concat", widen=False, result=_joined)
def concat(parts: tuple[Tensor, ...], axis: int) -> Tensor:
    return torch.cat(parts, axis)


@rule("Stack", widen=False, result=_joined, attributes=("axis",))
def stack(parts: tuple[Tensor, ...], axis: int) -> Tensor:
    return torch.stack(parts, axis)


@rule("Unstack", widen=False, result=first, attributes=("axis", "num"))
def unstack(x: Tensor, axis: int, num: int) -> tuple[Tensor, ...]:
    require(x.shape[axis] == num, f"gives {num} parts of {x.shape[axis]}")
    return x.unbind(axis)


@rule("Split", widen=False, result=first)
def split(x: Tensor, axis: int, num: int) -> tuple[Tensor, ...]:
    """Into `num` equal parts."""
    require(num > 0 and x.shape[axis] % num == 0, f"splits {x.shape[axis]} elements into {num} parts")
    return x.chunk(num, axis)


@rule("SplitWithSize", "SplitWithSizeView", widen=False, result=first)
def split_with_size(x: Tensor, sizes: tuple[int, ...], axis: int) -> tuple[Tensor, ...]:
    require(sum(sizes) == x.shape[axis], f"splits {x.shape[axis]} elements into parts of {sizes}")
    return x.split(sizes, axis)


@rule("SplitTensor", widen=False, result=first)
def split_tensor(x: Tensor, size: int, axis: int) -> tuple[Tensor, ...]:
    """Into parts of `size`; the last may be smaller."""
    return x.split(size, axis)


@rule("ChunkView", widen=False, result=first)
def chunk(x: Tensor, chunks: int, axis: int) -> tuple[Tensor, ...]:
    return x.chunk(chunks, axis)


@rule("Slice", widen=False)
def slice_(x: Tensor, begin: tuple[int, ...], size: tuple[int, ...]) -> Tensor:
    """`size` elements from `begin` on; -1 is all that follow."""
    index = []
    for n, b, s in zip(x.shape, begin, size, strict=True):
        end = n if s == -1 else b + s
        require(0 <= b < end <= n, f"takes {s} elements from {b} on of {n}")
        index.append(slice(b, end))
    return x[tuple(index)]


@rule("StridedSlice", widen=False)
def strided_slice(
    x: Tensor,
    begin: tuple[int, ...],
    end: tuple[int, ...],
    strides: tuple[int, ...],
    begin_mask: int,
    end_mask: int,
    ellipsis_mask: int,
    new_axis_mask: int,
    shrink_axis_mask: int,
) -> Tensor:
    """As ``x[begin:end:stride, ...]``. Bit i of a mask is for position i: begin (end) is left out; the position is an
    ellipsis; a new axis; an index. An ellipsis goes before a new axis, that before an index.
    """
    require(len(begin) == len(end) == len(strides), "has begin, end and strides of different lengths")
    require(all(s > 0 for s in strides), f"has the strides {strides}; negative ones are not supported")
    index: list[Any] = []
    for i, (b, e, s) in enumerate(zip(begin, end, strides)):
        if ellipsis_mask >> i & 1:
            require(Ellipsis not in index, "has two ellipses")
            index.append(Ellipsis)
        elif new_axis_mask >> i & 1:
            index.append(None)
        elif shrink_axis_mask >> i & 1:
            index.append(b)
        else:
            index.append(slice(None if begin_mask >> i & 1 else b, None if end_mask >> i & 1 else e, s))
    return x[tuple(index)]


@rule("Select", widen=False, result=lambda c, x, y: common(x, y))
def select(condition: Tensor, x: Tensor, y: Tensor) -> Tensor:
    require(condition.dtype == torch.bool, "has a condition that is not bool")
    return torch.where(condition, x, y)


@rule("MaskedFill", widen=False, result=lambda x, mask, value: common(x, value))
def masked_fill(x: Tensor, mask: Tensor, value: Tensor) -> Tensor:
    require(
        mask.dtype == torch.bool and value.numel() == 1, "takes a mask that is not bool, or several values"
    )
    return torch.where(mask, value, x)


@rule("TensorMove", widen=False)
def identity(x: Tensor) -> Tensor:
    return x
