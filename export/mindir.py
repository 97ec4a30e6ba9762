"""MindIR protos: a form that does not depend on the process that traced them, and parameters whose data is outside.

What a trace leaves in a proto that differs between two processes: the compile phase with its time and address, value
and graph names with counters of everything compiled before, the order and numbers of primitives, and scopes. All of
it is for debugging; `normalise` gives every value and primitive a number in order of appearance and drops the rest.
Operators of a library keep their names alone, because its file is another one on the machine that loads the graph.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import BundleError, ExportError
from .proto import pb

REFERENCE = "REF::"  # a node's op_type: this and the primitive's name
CUSTOM = "Custom"  # an operator of a library, which its attributes name
Place = tuple[str, int, int]
"""File name, offset from the file's start, length in bytes."""

_MUL = "Mul:of a number"  # a name that no trace gives
_NUMBERS: dict[int, Any] = {pb.TensorProto.FLOAT: np.float32, pb.TensorProto.INT32: np.int32}
_DTYPES = {
    pb.TensorProto.FLOAT: "float32",
    pb.TensorProto.FLOAT16: "float16",
    pb.TensorProto.BFLOAT16: "bfloat16",
    pb.TensorProto.INT32: "int32",
}


def read(path: Path) -> Any:
    """The ModelProto of a file. Raises BundleError: it is none."""
    model = pb.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except (
        Exception
    ) as e:  # DecodeError lives in a module of the protobuf package that its versions name differently
        raise BundleError(f"{path}: is no MindIR ({e}); export again") from None
    return model


def plain(name: str) -> str:
    """The name of an input or parameter without the prefix of the graph that it belongs to."""
    return name.partition(":")[2]


def parameters(model: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of a graph's parameters, weights and caches.

    Raises:
        ExportError: two parameters have one name.
    """
    found = {plain(p.name): (tuple(p.dims), _DTYPES[p.data_type]) for p in model.graph.parameter}
    if len(found) != len(model.graph.parameter):
        raise ExportError("the traced graph has two parameters of one name")
    return found


def inputs(model: Any) -> dict[str, tuple[tuple[int, ...], str]]:
    """Name -> (shape, dtype) of a graph's inputs, in order."""
    return {
        plain(i.name): (tuple(i.tensor[0].dims), _DTYPES[i.tensor[0].data_type]) for i in model.graph.input
    }


def outputs(model: Any) -> list[tuple[tuple[int, ...], str]]:
    """Shape and dtype of a graph's outputs, in order."""
    (output,) = model.graph.output
    return [(tuple(t.dims), _DTYPES[t.data_type]) for v in output.attr_info.values for t in v.tensors]


def keep_outputs(model: Any, count: int) -> None:
    """Leave out all outputs but the first `count`, and what only they need. Call :func:`normalise` after it."""
    graph = model.graph
    producer = {name: node for node in graph.node for name in node.output}
    node = producer[graph.output[0].name]
    infos = [graph.output[0].attr_info]
    while not node.op_type.startswith(
        f"{REFERENCE}MakeTuple"
    ):  # Depend: (the tuple, side effects to wait for)
        infos += [a for a in node.attribute if a.name == "shape"]
        node = producer[node.input[0]]
    infos += [a for a in node.attribute if a.name == "shape"]
    del node.input[count:]
    for info in infos:
        del info.values[count:]
    needed, left = set(), [graph.output[0].name]
    while left:
        name = left.pop()
        if name in producer and name not in needed:
            needed.add(name)
            left.extend(producer[name].input)
    kept = [type(n).FromString(n.SerializeToString()) for n in graph.node if needed.intersection(n.output)]
    del graph.node[:]
    graph.node.extend(kept)


def numbers_as_tensors(model: Any) -> None:
    """Make every product of a tensor and a number (Muls) one of two tensors (Mul). Call :func:`normalise` after it.

    Raises:
        ExportError: the tensor is bf16 or fp16, in which the number would be rounded.
    """
    primitives = {REFERENCE + p.name: p.op_type for p in model.primitives}
    numbers = {n.output[0]: n.attribute[0] for n in model.graph.node if n.op_type == "Constant"}
    nodes: list[Any] = []
    for node in model.graph.node:
        if primitives.get(node.op_type) == "Muls":
            (kind,) = (t.data_type for a in node.attribute if a.name == "shape" for t in a.tensors)
            if kind not in _NUMBERS:
                raise ExportError(f"{node.output[0]}: multiplies a number and a tensor that would round it")
            number = numbers[node.input[1]]
            value = _NUMBERS[kind](number.i or number.f)
            constant = pb.NodeProto(op_type="Constant", output=[f"{node.output[0]}:number"])
            held = constant.attribute.add(name="value", type=pb.AttributeProto.TENSORS).tensors.add()
            held.data_type, held.name, held.raw_data = kind, "value0", value.tobytes()
            constant.name = constant.output[0]
            node.op_type, node.input[1] = f"{REFERENCE}{_MUL}", constant.output[0]
            nodes.append(constant)
        nodes.append(node)
    model.primitives.add(name=_MUL, op_type="Mul", prim_type=pb.PrimitiveProto.PRIMITIVE_FUNCTION)
    used = {name for node in nodes for name in node.input}
    _keep(
        model.graph.node, (n for n in nodes if n.op_type != "Constant" or n.output[0] in used), ordered=True
    )


def point_at(model: Any, places: Mapping[str, Place]) -> None:
    """Let parameters find their data in files beside the graph; those that `places` leaves out have none."""
    for parameter in model.graph.parameter:
        place = places.get(plain(parameter.name))
        parameter.ClearField("raw_data")
        if place is None:
            parameter.ClearField("external_data")
        else:
            data = parameter.external_data
            data.location, data.offset, data.length = place


def pointing(model: Any) -> dict[str, Place]:
    """Where a graph's parameters find their data: the inverse of :func:`point_at`."""
    return {
        plain(p.name): (p.external_data.location, p.external_data.offset, p.external_data.length)
        for p in model.graph.parameter
        if p.HasField("external_data")
    }


def set_library(model: Any, path: Path | None) -> None:
    """Let operators of the library be found in this file; None leaves their names alone, which are the same everywhere."""
    for primitive in model.primitives:
        if primitive.op_type == CUSTOM:
            attributes = {a.name: a for a in primitive.attribute}
            name = attributes["func_name"].s.decode().rpartition(":")[2]
            where = f"{path}:{name}" if path else name
            attributes["func_name"].s = where.encode()
            attributes["uniq_name"].s = f"{CUSTOM}_{where}".encode()


def operator(primitive: Any) -> str:
    """What a primitive computes: its type, or the name of a library's operator."""
    if primitive.op_type != CUSTOM:
        return primitive.op_type
    (name,) = (a.s.decode() for a in primitive.attribute if a.name == "func_name")
    return name.rpartition(":")[2]


def serialise(model: Any) -> bytes:
    return model.SerializeToString(deterministic=True)


def normalise(model: Any) -> None:
    """Replace what differs between two traces of one network; the graph computes the same.

    Parameters and inputs keep their names after the colon.

    Raises:
        ExportError: the graph has sub-graphs, which only control flow that depends on data makes.
    """
    if model.functions:
        raise ExportError(f"the traced graph is not static: it calls {len(model.functions)} sub-graphs")
    graph = model.graph
    values: dict[str, str] = {}
    for value in [*graph.input, *graph.parameter]:
        values[value.name] = f"graph:{plain(value.name)}"
    outputs = (o for node in graph.node for o in node.output)
    values |= {name: f"graph:{i}" for i, name in enumerate(outputs)}
    for value in [*graph.input, *graph.parameter, *graph.output]:
        value.name = values[value.name]
    set_library(model, None)
    primitives = _number_primitives(model)
    for node in graph.node:
        node.input[:] = [values[name] for name in node.input]
        node.output[:] = [values[name] for name in node.output]
        node.name = node.output[0]
        node.ClearField("domain")
        if node.op_type.startswith(REFERENCE):
            node.op_type = REFERENCE + primitives[node.op_type.removeprefix(REFERENCE)]
    graph.name = "graph"
    _keep(graph.attribute, (a for a in graph.attribute if a.name != "compile_phase"))


def _number_primitives(model: Any) -> dict[str, str]:
    """Give the primitives new names, put them in the order of their use, and return old name -> new name."""
    by_name = {p.name: p for p in model.primitives}
    used: dict[str, str] = {}
    for node in model.graph.node:
        old = node.op_type.removeprefix(REFERENCE)
        if node.op_type.startswith(REFERENCE) and old not in used:
            if old not in by_name:
                raise ExportError(f"the traced graph calls {old}, which is no primitive")
            used[old] = f"{by_name[old].op_type}:{len(used)}"
    for old, new in used.items():
        primitive = by_name[old]
        primitive.name, primitive.instance_name = new, ""
        _keep(primitive.attribute, primitive.attribute)
    _keep(model.primitives, (by_name[old] for old in used), ordered=True)
    return used


def _keep(field: Any, messages: Iterable[Any], ordered: bool = False) -> None:
    """Make a repeated field hold these messages, by name unless they are in order already."""
    kept = [type(m).FromString(m.SerializeToString()) for m in messages]
    del field[:]
    field.extend(kept if ordered else sorted(kept, key=lambda m: m.name))
