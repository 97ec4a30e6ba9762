"""Matrix products. Weights are widened block by block, so the largest one need not fit in memory twice."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .errors import require
from .rules import FLOATS, common, rule
from .values import Value, wide

_BLOCK = 1 << 24  # elements of a weight that are wide at a time


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x [..., K] times weight [K, N], in fp32; weight may be a transposed view."""
    x = wide(x)
    if weight.dtype == x.dtype:
        return x @ weight
    columns = max(1, _BLOCK // weight.shape[0])
    return torch.cat([x @ wide(part) for part in weight.split(columns, 1)], -1)


@rule("MatMul", widen=False)
def mat_mul(x: Tensor, y: Tensor, transpose_a: bool, transpose_b: bool) -> Tensor:
    require(x.ndim == y.ndim == 2, f"multiplies {list(x.shape)} by {list(y.shape)}, expected matrices")
    return product(x.T if transpose_a else x, y.T if transpose_b else y)


@rule("BatchMatMul")
def batch_mat_mul(x: Tensor, y: Tensor, transpose_a: bool, transpose_b: bool) -> Tensor:
    require(x.ndim >= 2 and y.ndim >= 2, f"multiplies {list(x.shape)} by {list(y.shape)}")
    return (x.mT if transpose_a else x) @ (y.mT if transpose_b else y)


@rule("MatMulExt", widen=False)
def mat_mul_ext(x: Tensor, y: Tensor) -> Tensor:
    """As ``torch.matmul``."""
    return product(x, y) if y.ndim == 2 else wide(x) @ wide(y)


@rule("BatchMatMulExt")
def batch_mat_mul_ext(x: Tensor, y: Tensor) -> Tensor:
    require(x.ndim == y.ndim == 3, f"multiplies {list(x.shape)} by {list(y.shape)}, expected 3 dimensions")
    return x @ y


@rule("Dense", widen=False)
def dense(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = product(x, weight.T)
    return y if bias is None else y + wide(bias)


# Grouped -------------------------------------------------------------------------------------------------------------


def _grouped_dtype(x: tuple[Value, ...], weight: tuple[Value, ...], *_: Any) -> tuple[torch.dtype, ...]:
    return tuple(common(a, b) for a, b in zip(x, weight))


def _grouped(
    x: tuple[Tensor, ...],
    weight: tuple[Tensor, ...],
    ends: list[int] | None,
    extras: tuple[Any, ...],
    split_item: int,
    group_type: int,
) -> tuple[Tensor, ...]:
    """Rows of x[0] [M, K] up to each end times that group's matrix of weight[0] [E, K, N]; or a product per pair.

    Rows beyond the last group are not written by the operator: NaN here, so that their use shows.
    """
    require(
        all(e is None for e in extras),
        "has a bias, a scale, an offset or an activation, which are not supported",
    )
    if split_item == 0:
        require(
            group_type == -1 and ends is None,
            "has split_item 0, expected group_type -1 and no group_list with it",
        )
        require(len(x) == len(weight), f"has {len(x)} inputs for {len(weight)} weights")
        require(all(w.ndim == 2 for w in weight), "has weights that are not matrices")
        return tuple(product(a, w) for a, w in zip(x, weight))
    require(split_item == 3, f"has split_item {split_item}, expected 0 or 3")
    require(group_type == 0, f"has group_type {group_type}, expected 0 with split_item 3")
    require(len(x) == len(weight) == 1, f"has {len(x)} inputs and {len(weight)} weights, expected 1 of each")
    (rows,), (experts,) = x, weight
    require(rows.ndim == 2 and experts.ndim == 3, f"multiplies {list(rows.shape)} by {list(experts.shape)}")
    require(rows.shape[1] == experts.shape[1], f"multiplies {list(rows.shape)} by {list(experts.shape)}")
    require(
        len(experts) <= 1024 and max(*rows.shape[1:], *experts.shape[1:]) < 65536,
        "is larger than 1024 groups or 65535 columns",
    )
    if ends is None or len(ends) != len(experts):
        require(False, f"has {len(ends or ())} groups for {len(experts)} weights")
        raise AssertionError
    out = rows.new_full((len(rows), experts.shape[2]), torch.nan, dtype=wide(rows[:0]).dtype)
    begin = 0
    for matrix, end in zip(experts, ends):
        require(begin <= end <= len(rows), f"has the group {begin} to {end} of {len(rows)} rows")
        if end > begin:
            out[begin:end] = product(rows[begin:end], matrix)
        begin = end
    return (out,)


def _listed(group_list: Any) -> list[int] | None:
    if group_list is None or isinstance(group_list, tuple):
        return None if group_list is None else list(group_list)
    require(
        group_list.dtype == torch.int64 and group_list.ndim == 1,
        "has a group_list that is not int64 of one dimension",
    )
    return group_list.tolist()


def _check_info(info: Any, *arguments: Any) -> None:
    """`group_info` holds how many tensors each argument has (group_list always 1); the device reads it when it runs."""
    counts = tuple(0 if a is None else len(a) if isinstance(a, tuple) else 1 for a in arguments)
    require(tuple(info)[: len(counts)] == counts, f"has group_info {info}, expected {counts}")


@rule("GroupedMatmul", widen=False, result=_grouped_dtype, floats=FLOATS, attributes=("group_info",))
def grouped_matmul(x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, group_list, split_item, group_type, transpose_a, transpose_b, group_info):  # fmt: skip
    """group_list: ends."""
    require(not transpose_a and not transpose_b, "transposes, which the front end refuses")
    extras = (bias, scale, offset, antiquant_scale, antiquant_offset)
    _check_info(group_info, x, weight, *extras)
    return _grouped(x, weight, _listed(group_list), extras, split_item, group_type)


@rule("GroupedMatmulV2", widen=False, result=_grouped_dtype, floats=FLOATS, attributes=("group_info",))
def grouped_matmul_v2(x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, group_list, split_item, group_type, group_info):  # fmt: skip
    """group_list: ends, as numbers known to the host."""
    require(
        group_list is None or isinstance(group_list, tuple),
        "has a group_list that is a tensor, expected numbers",
    )
    extras = (bias, scale, offset, antiquant_scale, antiquant_offset)
    _check_info(group_info, x, weight, *extras)
    return _grouped(x, weight, _listed(group_list), extras, split_item, group_type)


@rule("GroupedMatmulV4", widen=False, result=_grouped_dtype, floats=FLOATS, attributes=("group_info",))
def grouped_matmul_v4(x, weight, bias, scale, offset, antiquant_scale, antiquant_offset, pre_token_scale, group_list, activation_input, activation_quant_scale, activation_quant_offset, split_item, group_type, group_list_type, act_type, output_dtype=None, *, group_info):  # fmt: skip
    """group_list: ends (group_list_type 0) or counts (1). MindSpore 2.7.0 has no output_dtype."""
    require(
        group_list_type in (0, 1), f"has group_list_type {group_list_type}, expected 0 (ends) or 1 (counts)"
    )
    require(act_type == 0 and output_dtype is None, "has an activation or another output dtype")
    first = (bias, scale, offset, antiquant_scale, antiquant_offset, pre_token_scale)
    last = (activation_input, activation_quant_scale, activation_quant_offset)
    _check_info(group_info, x, weight, *first, (group_list,), *last)
    numbers = _listed(group_list)
    if numbers is not None and group_list_type == 1:
        require(min(numbers, default=0) >= 0, f"has the counts {numbers}")
        numbers = torch.tensor(numbers).cumsum(0).tolist()
    return _grouped(x, weight, numbers, (*first, *last), split_item, group_type)
