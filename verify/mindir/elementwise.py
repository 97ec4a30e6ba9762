"""Element by element: arithmetic, comparisons, functions of one number, casts; and reductions.

Operators whose name ends in Ext are those of ``mindspore.mint``, with Torch's semantics.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import require
from .rules import common, rule
from .values import TYPE_IDS, Value

_BINARY: dict[str, Callable[..., Tensor]] = {
    "Add": torch.add,
    "Sub": torch.sub,
    "Mul": torch.mul,
    "Maximum": torch.maximum,
    "Minimum": torch.minimum,
    "Pow": torch.pow,
    "FloorDiv": torch.floor_divide,
    "FloorMod": torch.remainder,
    "RemainderTensorTensor": torch.remainder,
}
_COMPARISONS: dict[str, Callable[..., Tensor]] = {
    "Greater": torch.gt,
    "GreaterEqual": torch.ge,
    "Less": torch.lt,
    "LessEqual": torch.le,
    "Equal": torch.eq,
    "NotEqual": torch.ne,
    "LogicalAnd": torch.logical_and,
    "LogicalOr": torch.logical_or,
}
_UNARY: dict[str, Callable[..., Tensor]] = {
    "Neg": torch.neg,
    "Abs": torch.abs,
    "Square": torch.square,
    "Exp": torch.exp,
    "Sqrt": torch.sqrt,
    "Rsqrt": torch.rsqrt,
    "Sigmoid": torch.sigmoid,
    "Tanh": torch.tanh,
    "Sin": torch.sin,
    "Cos": torch.cos,
    "Erf": torch.erf,
    "SiLU": F.silu,
    "ReLU": torch.relu,
    "Floor": torch.floor,
}
for _operator, _function in _BINARY.items():
    rule(_operator)(_function)
for _operator, _function in _COMPARISONS.items():
    rule(_operator, result=lambda x, y: (common(x, y), torch.bool)[1])(_function)
for _operator, _function in _UNARY.items():
    rule(_operator)(_function)

rule("LogicalNot")(torch.logical_not)


@rule("Muls")
def muls(x: Tensor, scalar: float) -> Tensor:
    return x * scalar


@rule("Divs")
def divs(x: Tensor, scalar: float) -> Tensor:
    require(x.is_floating_point(), "divides integers, which would give a float")
    return x / scalar


@rule("Div")
def div(x: Tensor, y: Tensor) -> Tensor:
    require(x.is_floating_point(), "divides integers, which would give a float")
    return x / y


@rule("AddExt")
def add_ext(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    return x + y * alpha


@rule("SubExt")
def sub_ext(x: Tensor, y: Tensor, alpha: float) -> Tensor:
    return x - y * alpha


@rule("Log", attributes=("base", "scale", "shift"))
def log(x: Tensor, base: float, scale: float, shift: float) -> Tensor:
    require((base, scale, shift) == (-1.0, 1.0, 0.0), "has another base, scale or shift than log's")
    return torch.log(x)


@rule("GeLU")
def gelu(x: Tensor) -> Tensor:
    """The tanh form: of the docstring's example, gelu(1) = 0.841192 is this one's value and not erf's 0.841345."""
    return F.gelu(x, approximate="tanh")


@rule("GeluExt")
def gelu_ext(x: Tensor, approximate: int) -> Tensor:
    require(approximate in (0, 1), f"has approximate {approximate}, expected 0 (none) or 1 (tanh)")
    return F.gelu(x, approximate="tanh" if approximate else "none")


def _cast_dtype(x: Value, type_id: int) -> torch.dtype:
    require(type_id in TYPE_IDS, f"casts to type {type_id}, which is not supported")
    return TYPE_IDS[type_id]


@rule("Cast", result=_cast_dtype)
def cast(x: Tensor, type_id: int) -> Tensor:
    """To a float of 16 bits: what the interpreter makes of any result of that dtype."""
    dtype = TYPE_IDS[type_id]
    return x.float() if dtype.is_floating_point and dtype.itemsize == 2 else x.to(dtype)


@rule("Softmax")
def softmax(x: Tensor, axis: int | tuple[int, ...]) -> Tensor:
    axes = _axes(x, axis)
    require(len(axes) == 1, f"has the axes {axes}, expected one")
    return torch.softmax(x, axes[0])


@rule("BiasAdd")
def bias_add(x: Tensor, bias: Tensor, data_format: int) -> Tensor:
    """Along axis 1 (NCHW, 0)."""
    require(data_format == 0, f"has the data format {data_format}, expected 0 (NCHW)")
    require(
        bias.ndim == 1 and x.ndim >= 2 and x.shape[1] == len(bias), "has a bias of another length than axis 1"
    )
    return x + bias.reshape(-1, *[1] * (x.ndim - 2))


# Reductions ----------------------------------------------------------------------------------------------------------


def _axes(x: Tensor, axis: Any) -> tuple[int, ...]:
    """The axes of a reduction, none given meaning all."""
    if axis is None or axis == ():
        return tuple(range(x.ndim))
    return axis if isinstance(axis, tuple) else (axis,)


@rule("ReduceSum")
def reduce_sum(x: Tensor, axis: Any, keep_dims: bool, skip_mode: bool) -> Tensor:
    require(not skip_mode, "has skip_mode")
    return x.sum(_axes(x, axis), keepdim=keep_dims, dtype=x.dtype)


@rule("ReduceMean")
def reduce_mean(x: Tensor, axis: Any, keep_dims: bool) -> Tensor:
    return x.mean(_axes(x, axis), keepdim=keep_dims)


@rule("ReduceMax")
def reduce_max(x: Tensor, axis: Any, keep_dims: bool) -> Tensor:
    return x.amax(_axes(x, axis), keepdim=keep_dims)


@rule("ReduceMin")
def reduce_min(x: Tensor, axis: Any, keep_dims: bool) -> Tensor:
    return x.amin(_axes(x, axis), keepdim=keep_dims)


def _sum_dtype(x: Value, axis: Any, keep_dims: bool, type_id: int | None) -> torch.dtype:
    if type_id is not None:
        return _cast_dtype(x, type_id)
    return x.dtype if x.dtype.is_floating_point else torch.int64


@rule("SumExt", result=_sum_dtype)
def sum_ext(x: Tensor, axis: Any, keep_dims: bool, type_id: int | None) -> Tensor:
    return x.sum(_axes(x, axis), keepdim=keep_dims)


@rule("MeanExt")
def mean_ext(x: Tensor, axis: Any, keep_dims: bool, type_id: int | None) -> Tensor:
    require(type_id is None, "has another dtype than its input")
    return x.mean(_axes(x, axis), keepdim=keep_dims)


@rule("CumSum")
def cum_sum(x: Tensor, axis: int, exclusive: bool, reverse: bool) -> Tensor:
    require(not exclusive and not reverse, "is exclusive or reverse")
    return x.cumsum(axis, dtype=x.dtype)


@rule("CumsumExt")
def cumsum_ext(x: Tensor, axis: int, type_id: int | None) -> Tensor:
    require(type_id is None, "has another dtype than its input")
    return x.cumsum(axis, dtype=x.dtype)


@rule("Argmax", result=lambda x, axis, type_id: _cast_dtype(x, type_id))
def argmax(x: Tensor, axis: int, type_id: int) -> Tensor:
    return x.argmax(axis)
