"""The operators of a bundle's graphs, one at a time: each node as it stands in the graph, made a graph of its own.

So a kernel is called with the arguments, the attributes and the shapes that the bundle calls it with, after a reload, as
the bundle is; and what it gives is held against plain numpy.
"""

from __future__ import annotations

import statistics
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from device_formulas import FORMULAS, MOVED, TOLERANCES, adjust
from device_graphs import NUMPY, DeviceBundle, load_bare, operator, read_model, to_numpy, widened

# What starts nothing on the device: structure, order, other views of the same memory.
FREE = ("Constant", "Depend", "ExpandDims", "Load", "MakeTuple", "Reshape", "TupleGetItem", "UpdateState")
WRITES = ("KVCacheScatterUpdate", "ScatterUpdate")  # their first operand is a parameter
DTYPES = {1: "float32", 6: "int32", 7: "int64", 9: "bool", 10: "float16", 16: "bfloat16"}  # of TensorProto


@dataclass(frozen=True)
class Operand:
    """An argument that is a tensor of the graph."""

    value: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Call:
    """One node: its arguments are Operands, tuples of these, or constants."""

    graph: str
    model: Any
    node: Any
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        """`MatMul bfloat16[1,128] bfloat16[768,128]`."""
        return " ".join([operator(self.node), *(shown(a) for a in self.arguments if tensors(a))])


def shown(argument: Any) -> str:
    if isinstance(argument, tuple):
        return f"({' '.join(map(shown, argument))})"
    return f"{argument.dtype}[{','.join(map(str, argument.shape))}]"


def tensors(argument: Any) -> list[Operand]:
    """The operands in an argument."""
    if isinstance(argument, tuple):
        return [o for a in argument for o in tensors(a)]
    return [argument] if isinstance(argument, Operand) else []


def calls(bundle: DeviceBundle) -> list[Call]:
    """The different calls of a bundle: of the smallest vision, the largest prefill and the largest decode graph."""
    graphs = [*bundle.of_kind("vision")[:1], *bundle.of_kind("prefill")[-1:], *bundle.of_kind("decode")[-1:]]
    found: dict[tuple[str, str], Call] = {}
    for graph in graphs:
        model = read_model(bundle.directory / bundle.graphs[graph]["file"])
        for call in _calls_of(graph, model):
            found.setdefault((call.name, str([a for a in call.arguments if not tensors(a)])), call)
    return sorted(found.values(), key=lambda c: operator(c.node))


def _calls_of(graph: str, model: Any) -> Iterator[Call]:
    values = _values(model)
    for node in model.graph.node:
        if operator(node) not in FREE:
            arguments = tuple(values[i] for i in node.input if values.get(i, MONAD) is not MONAD)
            if any(map(tensors, arguments)):
                yield Call(graph, model, node, arguments)


RUNS = 3  # of which a time is the median
MONAD = object()
"""An argument that only orders effects."""


def _values(model: Any) -> dict[str, Any]:
    """What every value of a graph is, as an argument."""
    values: dict[str, Any] = {}
    for value in model.graph.input:
        values[value.name] = _operand(value.name, value.tensor[0])
    for parameter in model.graph.parameter:
        values[parameter.name] = _operand(parameter.name, parameter)
    for node in model.graph.node:
        name, kind = node.output[0], operator(node)
        if kind == "Constant":
            values[name] = _constant(node.attribute[0])
        elif kind == "MakeTuple":
            values[name] = tuple(values[i] for i in node.input)
        elif kind == "UpdateState":
            values[name] = MONAD
        else:
            held = [t for a in node.attribute if a.name == "shape" for t in a.tensors]
            if held:
                values[name] = _operand(name, held[0])
    return values


def _operand(name: str, proto: Any) -> Operand:
    return Operand(name, tuple(proto.dims), DTYPES[proto.data_type])


def _constant(attribute: Any) -> Any:
    """What a Constant node or an attribute holds; a tensor as an array."""
    kind = attribute.AttributeType.Name(attribute.type)
    if kind in ("TUPLE", "LIST"):
        return tuple(_constant(v) for v in attribute.values)
    if kind == "TENSORS":
        proto = attribute.tensors[0]
        dtype = DTYPES[proto.data_type]
        data = np.frombuffer(proto.raw_data, NUMPY.get(dtype, dtype)).reshape(tuple(proto.dims))
        return widened(data) if dtype == "bfloat16" else data
    if kind in ("UMONAD", "IOMONAD"):
        return MONAD
    if kind == "STRING":
        return (attribute.s or b"".join(attribute.strings)).decode()
    if kind == "FLOAT":
        return attribute.floats[0] if attribute.floats else attribute.f
    if kind == "DOUBLE":
        return attribute.doubles[0] if attribute.doubles else attribute.d
    if kind == "BOOL":
        return bool(attribute.ints[0] if attribute.ints else attribute.i)
    if kind.startswith(("INT", "UINT")):
        return attribute.ints[0] if attribute.ints else attribute.i
    return None


# ---- running one ----------------------------------------------------------------------------------------------------


def single(call: Call) -> tuple[Any, list[Operand]]:
    """A graph of one node, and its inputs in order; the operand that a node writes into stays a parameter."""
    model = type(call.model)()
    model.CopyFrom(call.model)
    graph, node = model.graph, call.node
    makers = {name: n for n in graph.node for name in n.output}
    first = {p.name: p for p in graph.parameter}
    nodes, inputs, parameters = [], {}, []

    def take(value: str) -> None:
        maker = makers.get(value)
        if maker is not None and operator(maker) in ("MakeTuple", "Constant"):
            for i in maker.input:
                take(i)
            nodes.append(maker)
        elif maker is not None and operator(maker) == "UpdateState":
            monad = next(
                n for n in graph.node if operator(n) == "Constant" and _constant(n.attribute[0]) is MONAD
            )
            renamed[value] = monad.output[0]
            nodes.append(monad)
        elif operator(node) in WRITES and value in first:
            parameters.append(first[value])
        else:
            inputs[value] = next(o for a in call.arguments for o in tensors(a) if o.value == value)

    renamed: dict[str, str] = {}
    for value in node.input:
        take(value)
    parts = [
        type(n).FromString(n.SerializeToString()) for n in {n.output[0]: n for n in [*nodes, node]}.values()
    ]
    parts[-1].input[:] = [renamed.get(i, i) for i in node.input]
    kind = next(a for a in node.attribute if a.name == "shape")
    result = graph.output[0]
    if kind.values:  # a tuple already
        result.name = node.output[0]
        result.attr_info.CopyFrom(kind)
    else:
        parts.append(_tuple_of(graph, node.output[0], kind))
        result.name = parts[-1].output[0]
        result.attr_info.CopyFrom(next(a for a in parts[-1].attribute if a.name == "shape"))
    held = [type(p).FromString(p.SerializeToString()) for p in parameters]
    for field, kept in ((graph.node, parts), (graph.parameter, held)):
        del field[:]
        field.extend(kept)
    _set_inputs(graph, inputs.values())
    return model, list(inputs.values())


def _tuple_of(graph: Any, value: str, kind: Any) -> Any:
    """A MakeTuple of one value, made from the one that every graph of a bundle ends with."""
    maker = next(n for n in reversed(graph.node) if operator(n) == "MakeTuple")
    made = type(maker).FromString(maker.SerializeToString())
    made.input[:] = [value]
    made.name = made.output[0] = "graph:single"
    of = next(a for a in made.attribute if a.name == "shape")
    del of.values[:]
    of.values.add().CopyFrom(kind)
    of.values[0].name = ""
    return made


def _set_inputs(graph: Any, operands: Any) -> None:
    proto = {name: number for number, name in DTYPES.items()}
    del graph.input[:]
    for operand in operands:
        entry = graph.input.add()
        entry.name = operand.value
        tensor = entry.tensor.add()
        tensor.dims.extend(operand.shape)
        tensor.data_type = proto[operand.dtype]


Execute = Callable[[Call, dict[str, np.ndarray]], list[tuple[str, np.ndarray]]]
"""Runs a node on arrays by operand: (dtype, array) of each result; floats in fp32."""


def check(call: Call, execute: Execute) -> dict:
    """Runs a node on inputs from a fixed seed, and holds what comes out against the formula.

    Returns:
        `ok`, `says`, and `rel_l2`, the worst over its results. Without a formula it is only run.
    """
    name = operator(call.node)
    rng = np.random.default_rng(zlib.crc32(call.name.encode()))
    drawn: dict[str, np.ndarray] = {}
    arguments = [_random(a, rng, drawn) for a in call.arguments]
    adjust(name, arguments, rng)
    arguments = [_as_held(a, like) for a, like in zip(arguments, call.arguments)]
    given = {}
    for argument, like in zip(arguments, call.arguments):
        values = argument if isinstance(argument, tuple) else (argument,)
        given.update({o.value: v for o, v in zip(tensors(like), values)})
    observed = execute(call, given)
    if name not in FORMULAS:
        return {"ok": True, "says": "ran; there is no formula to hold it against"}
    formula, nearness = FORMULAS[name]
    expected = formula(*arguments)
    return compared(expected if isinstance(expected, (tuple, list)) else (expected,), observed, nearness)


def compared(expected: Sequence[Any], observed: list[tuple[str, np.ndarray]], nearness: str) -> dict:
    """The results of an operator against those of its formula."""
    worst = limit = 0.0
    undefined = ""
    for wanted, (dtype, found) in zip(expected, observed):
        if wanted is None:
            continue
        wanted = np.asarray(wanted)
        if wanted.shape != found.shape:
            return {"ok": False, "says": f"gives shape {list(found.shape)}, expected {list(wanted.shape)}"}
        defined = ~np.isnan(wanted) if wanted.dtype.kind == "f" else np.ones(wanted.shape, bool)
        if not defined.all():
            rest = found[~defined]
            held = "NaN" if np.isnan(rest).any() else "numbers" if rest.any() else "zeros"
            undefined = f"; what is not defined holds {held}"
        if dtype not in TOLERANCES:
            wrong = int((wanted[defined].astype(np.int64) != found[defined].astype(np.int64)).sum())
            if wrong:
                return {"ok": False, "says": f"{wrong} of {wanted.size} numbers are others"}
            continue
        ours, theirs = wanted[defined].astype(np.float64), found[defined].astype(np.float64)
        distance = float(np.linalg.norm(theirs - ours)) / max(float(np.linalg.norm(ours)), 1e-30)
        limit = TOLERANCES[dtype][nearness]
        worst = max(worst, distance)
        if not distance <= limit:  # NaN is no distance
            return {"ok": False, "says": f"relative L2 {distance:.2g}, allowed {limit:.2g}"}
    near = "equal" if nearness == MOVED else f"relative L2 {worst:.1e}, allowed {limit:.1e}"
    return {
        "ok": True,
        "rel_l2": worst,
        "says": near + undefined,
        "answer": (near + undefined) if undefined else None,
    }


class Runner:
    """Runs nodes in MindSpore; `milliseconds` is the median time of the last one, results brought to the host."""

    def __init__(self) -> None:
        self.milliseconds = 0.0

    def __call__(self, call: Call, given: dict[str, np.ndarray]) -> list[tuple[str, np.ndarray]]:
        model, inputs = single(call)
        cell = load_bare(model)
        parameters = cell.parameters_dict()
        for operand in (o for a in call.arguments for o in tensors(a)):
            plain = operand.value.partition(":")[2]
            if plain in parameters:
                parameters[plain].set_data(_tensor(given[operand.value], operand.dtype))
        arguments = [_tensor(given[o.value], o.dtype) for o in inputs]
        seconds, results = [], []
        for _ in range(RUNS):
            started = time.perf_counter()
            out = cell(*arguments)
            out = out if isinstance(out, (tuple, list)) else (out,)
            results = [(str(o.dtype).lower(), to_numpy(o)) for o in out]
            seconds.append(time.perf_counter() - started)
        self.milliseconds = statistics.median(seconds) * 1e3
        return results


def _tensor(array: np.ndarray, dtype: str) -> Any:
    import mindspore as ms

    if dtype == "bfloat16":
        return ms.Tensor(np.array(array, np.float32, order="C")).astype(ms.bfloat16)
    return ms.Tensor(np.array(array, np.dtype(dtype), order="C"))


def _random(argument: Any, rng: np.random.Generator, drawn: dict[str, np.ndarray]) -> Any:
    """Numbers for every operand, the same for one that is taken twice."""
    if isinstance(argument, tuple):
        return tuple(_random(a, rng, drawn) for a in argument)
    if not isinstance(argument, Operand):
        return argument
    if argument.value not in drawn:
        if argument.dtype == "bool":
            made: np.ndarray = rng.random(argument.shape) < 0.5
        elif argument.dtype.startswith("int"):
            made = rng.integers(0, 8, argument.shape)
        else:
            made = rng.standard_normal(argument.shape, np.float32)
        drawn[argument.value] = made
    return drawn[argument.value]


def _as_held(value: Any, like: Any) -> Any:
    """The number that the graph's dtype makes of a float, in fp32."""
    if isinstance(value, tuple):
        return tuple(_as_held(v, a) for v, a in zip(value, like)) if isinstance(like, tuple) else value
    if not isinstance(like, Operand):
        return value
    value = np.asarray(value)
    if like.dtype == "float16":
        return value.astype(np.float16).astype(np.float32)
    if like.dtype == "bfloat16":  # to the nearest, halves to the even one
        bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) & np.uint32(0xFFFF0000)).view(np.float32)
    return value
