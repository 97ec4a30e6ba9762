"""Values of a graph: tensors with the dtype that the graph declares, and what constants decode to."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import torch

from ...export.proto import pb
from .errors import InterpreterError

LOW = (torch.bfloat16, torch.float16)
"""Dtypes whose arithmetic is done in fp32."""

_PROTO = pb.TensorProto
PROTO_DTYPES = {
    _PROTO.FLOAT: torch.float32,
    _PROTO.FLOAT16: torch.float16,
    _PROTO.BFLOAT16: torch.bfloat16,
    _PROTO.DOUBLE: torch.float64,
    _PROTO.FLOAT64: torch.float64,
    _PROTO.BOOL: torch.bool,
    _PROTO.UINT8: torch.uint8,
    _PROTO.INT8: torch.int8,
    _PROTO.INT16: torch.int16,
    _PROTO.INT32: torch.int32,
    _PROTO.INT64: torch.int64,
}
TYPE_IDS = {
    30: torch.bool,
    32: torch.int8,
    33: torch.int16,
    34: torch.int32,
    35: torch.int64,
    37: torch.uint8,
    42: torch.float16,
    43: torch.float32,
    44: torch.float64,
    45: torch.bfloat16,
}
"""MindSpore's TypeId, as an argument of Cast and the like."""

_NUMPY = {torch.bfloat16: np.dtype(ml_dtypes.bfloat16), torch.float16: np.dtype(np.float16)}


class Monad:
    """The order of side effects. Nodes run in the order of the file, so it has no content."""

    def __repr__(self) -> str:
        return "U"


MONAD = Monad()


@dataclass(frozen=True)
class Spec:
    """Shape and dtype of a tensor, as a graph declares them."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{name(self.dtype)} {list(self.shape)}"


@dataclass(frozen=True)
class Value:
    """A tensor of the graph. `data` may be held wider than `dtype`, what the graph declares: see Interpreter.

    `parameter` is the plain name of the parameter that this is, to an operator that writes in place.
    """

    data: torch.Tensor
    dtype: torch.dtype
    parameter: str | None = None

    @property
    def spec(self) -> Spec:
        return Spec(tuple(self.data.shape), self.dtype)


@dataclass(frozen=True)
class Closure:
    """A sub-graph, by name, and the first arguments of its call."""

    graph: str
    bound: tuple[Any, ...] = ()


def name(dtype: torch.dtype) -> str:
    """`bfloat16` of torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def described(value: Any) -> str:
    """A value or a declared type in an error message."""
    if isinstance(value, Value):
        return str(value.spec)
    if isinstance(value, tuple):
        return f"({', '.join(map(described, value))})"
    return str(value)


def mapped(function: Callable[[Value], Any], value: Any) -> Any:
    """`value`, a tree of tuples, with `function` of its tensors."""
    if isinstance(value, tuple):
        return tuple(mapped(function, v) for v in value)
    return function(value) if isinstance(value, Value) else value


def wide(data: torch.Tensor) -> torch.Tensor:
    """bf16 and fp16 as fp32, without a change of value; all else as it is."""
    return data.float() if data.dtype in LOW else data


def from_numpy(array: np.ndarray) -> torch.Tensor:
    """The same memory as a tensor, where it is contiguous; a read-only array must not be written through it."""
    array = np.asarray(array, order="C")
    with warnings.catch_warnings():  # of memory maps that are read-only
        warnings.simplefilter("ignore", UserWarning)
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)


def to_numpy(data: torch.Tensor) -> np.ndarray:
    data = data.contiguous()
    if data.dtype == torch.bfloat16:
        return data.view(torch.int16).numpy().view(_NUMPY[torch.bfloat16])
    return data.numpy()


def tensor_spec(proto: Any) -> Spec:
    """Of a TensorProto. Raises InterpreterError: a dtype that has no counterpart here."""
    dtype = PROTO_DTYPES.get(proto.data_type)
    if dtype is None:
        kind = _PROTO.DataType.Name(proto.data_type)
        raise InterpreterError(f"{proto.name or 'a tensor'}: has the dtype {kind}, which is not supported")
    return Spec(tuple(proto.dims), dtype)


def constant(attribute: Any) -> Any:
    """What a Constant node or a primitive's attribute holds: numbers, strings, None, tensors, closures, tuples of these."""
    kind = pb.AttributeProto.AttributeType.Name(attribute.type)
    if kind in ("TUPLE", "LIST"):
        return tuple(constant(v) for v in attribute.values)
    if kind == "TENSORS":
        return _constant_tensor(attribute.tensors[0])
    if kind == "STRING":
        return (attribute.s or b"".join(attribute.strings)).decode()
    if kind in ("UMONAD", "IOMONAD"):
        return MONAD
    if kind in ("NONE", "TYPE_NULL"):
        return None
    if kind == "FUNCGRAPHCLOSURE":
        return Closure((attribute.s or b"".join(attribute.strings)).decode())
    if kind == "FLOAT":
        return attribute.floats[0] if attribute.floats else attribute.f
    if kind == "DOUBLE":
        return attribute.doubles[0] if attribute.doubles else attribute.d
    if kind == "BOOL":
        return bool(attribute.ints[0] if attribute.ints else attribute.i)
    if kind.startswith(("INT", "UINT")):
        return attribute.ints[0] if attribute.ints else attribute.i
    raise InterpreterError(f"a constant of the kind {kind} is not supported")


def declared(attribute: Any) -> Any:
    """What a node declares its output to be: a Spec, a tuple of these, or None where it says nothing of a tensor."""
    kind = pb.AttributeProto.AttributeType.Name(attribute.type)
    if kind in ("TUPLE", "LIST"):
        return tuple(declared(v) for v in attribute.values)
    return tensor_spec(attribute.tensors[0]) if kind == "TENSORS" else None


def _constant_tensor(proto: Any) -> Value:
    spec = tensor_spec(proto)
    if len(proto.raw_data) != math.prod(spec.shape) * spec.dtype.itemsize:
        raise InterpreterError(f"a constant of {spec} has {len(proto.raw_data)} bytes")
    if not proto.raw_data:
        return Value(torch.empty(spec.shape, dtype=spec.dtype), spec.dtype)
    data = torch.frombuffer(bytearray(proto.raw_data), dtype=spec.dtype)
    return Value(data.reshape(spec.shape), spec.dtype)
