"""A MindIR graph as nodes with the tensors that they take and give: what memory, FLOPs and pictures are computed from.

Of any MindIR, read without MindSpore. Only the main graph has nodes here; graphs with control flow call others.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from . import mindir
from .mindir import REFERENCE, plain
from .proto import pb

# Operators that give another view of what they take, so no memory and no work.
VIEWS = ("Depend", "ExpandDims", "Flatten", "Load", "Reshape", "Return", "Squeeze")
# Those that only say what belongs together, or what comes first.
STRUCTURE = ("ListGetItem", "MakeList", "MakeTuple", "TupleGetItem", "UpdateState")
# Those that write into a parameter, their first operand, and give it.
WRITES = ("Assign", "InplaceIndexCopy", "KVCacheScatterUpdate", "ScatterNdUpdate", "ScatterUpdate")

ORDER = object()  # a constant that stands for what comes first, before all nodes
BEFORE, AFTER = -1, 1 << 30  # the place of a node that belongs to no layer

_NUMBERED = re.compile(r"(?:\.(?:layers|blocks)|^cache)\.(\d+)\.")
_SIZES = {
    "FLOAT": 4, "FLOAT16": 2, "BFLOAT16": 2, "DOUBLE": 8, "BOOL": 1, "INT8": 1, "UINT8": 1, "INT16": 2, "UINT16": 2,
    "INT32": 4, "UINT32": 4, "INT64": 8, "UINT64": 8, "COMPLEX64": 8, "COMPLEX128": 16,
}  # fmt: skip
_NAMES = {"FLOAT": "float32", "DOUBLE": "float64"}


@dataclass(frozen=True)
class Tensor:
    """Shape and dtype; a length of -1 is not known."""

    shape: tuple[int, ...]
    dtype: str
    itemsize: int

    @property
    def nbytes(self) -> int:
        """0 where a length is not known."""
        return math.prod(self.shape) * self.itemsize if min(self.shape, default=1) >= 0 else 0

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


Kind = Any
"""What a value is: a Tensor, a tuple of kinds, or None for what is no tensor."""


@dataclass(frozen=True)
class Node:
    """One operator call; `inputs` and `output` name values of the graph, `number` is its place in the file."""

    number: int
    operator: str
    inputs: tuple[str, ...]
    output: str
    kind: Kind

    @property
    def free(self) -> bool:
        """It starts nothing."""
        return self.operator in VIEWS or self.operator in STRUCTURE

    def __str__(self) -> str:
        return f"{plain(self.output) or self.output} ({self.operator})"


@dataclass(frozen=True)
class Nodes:
    """See the module.

    Attributes:
        inputs, parameters: tensors by the names of values.
        constants: by the names of values: numbers, strings, Tensors (not their content), tuples of these, `ORDER`, or None
            for all else.
        nodes: in the order of the file.
        result: the value that the graph gives.
        calls: sub-graphs in the file.
    """

    inputs: dict[str, Tensor]
    parameters: dict[str, Tensor]
    constants: dict[str, Any]
    nodes: tuple[Node, ...]
    result: str
    calls: int

    @cached_property
    def makers(self) -> dict[str, Node]:
        return {node.output: node for node in self.nodes}

    def kind(self, value: str) -> Kind:
        """What a value is."""
        for named in (self.inputs, self.parameters):
            if value in named:
                return named[value]
        if value in self.makers:
            return self.makers[value].kind
        constant = self.constants.get(value)
        return constant if isinstance(constant, Tensor) else None

    def origin(self, value: str) -> str:
        """The value that this one is a view of, or itself; a write is a view of what it writes into."""
        while (node := self.makers.get(value)) and node.operator in (*VIEWS, *WRITES):
            value = node.inputs[0]
        return value

    def part(self, node: Node) -> int:
        """Which element of its operand a TupleGetItem gives."""
        return int(self.constants.get(node.inputs[1]) or 0)

    @cached_property
    def caches(self) -> frozenset[str]:
        """The parameters that the graph writes into."""
        written = (self.origin(node.output) for node in self.nodes if node.operator in WRITES)
        return frozenset(written) & frozenset(self.parameters)

    @cached_property
    def places(self) -> dict[str, int]:
        """The layer that each node belongs to, by what it gives: `BEFORE`, a layer's number, or `AFTER`.

        A node is of the layer of its parameters and of what it takes, the latest. Parameters without a number that meet
        what a layer gave stand after all layers. So what a norm of plain operators does before it takes its weight is
        counted to the layer before; a fused one is where it belongs.
        """
        places: dict[str, int] = {}
        for node in self.nodes:
            if node.operator == "UpdateState":  # it names parameters of all that went before
                places[node.output] = BEFORE
                continue
            taken = node.inputs[:1] if node.operator in VIEWS else node.inputs
            names = [plain(v) or v for v in map(self.origin, taken) if v in self.parameters]
            numbers = [int(m[1]) for m in map(_NUMBERED.search, names) if m]
            place = max([*numbers, *(places.get(v, BEFORE) for v in taken)], default=BEFORE)
            if place > BEFORE and len(numbers) < len(names):
                place = AFTER
            places[node.output] = place
        return places


def flat(kind: Kind) -> Iterator[Any]:
    """The tensors of a kind, or the leaves of another tree of tuples."""
    if isinstance(kind, tuple):
        for part in kind:
            yield from flat(part)
    elif kind is not None:
        yield kind


def read_nodes(model: Any) -> Nodes:
    """The main graph of a ModelProto."""
    graph = model.graph
    primitives = {p.name: mindir.operator(p) for p in model.primitives}
    constants, nodes = {}, []
    for number, node in enumerate(graph.node):
        if node.op_type == "Constant":
            constants[node.output[0]] = _constant(node.attribute[0])
            continue
        reference = node.op_type.removeprefix(REFERENCE)
        kinds = [_kind(a) for a in node.attribute if a.name == "shape"]
        operator = primitives.get(reference) or reference.partition(":")[0]
        nodes.append(Node(number, operator, tuple(node.input), node.output[0], kinds[0] if kinds else None))
    return Nodes(
        inputs={i.name: _tensor(i.tensor[0]) for i in graph.input if i.tensor},
        parameters={p.name: _tensor(p) for p in graph.parameter},
        constants=constants,
        nodes=tuple(nodes),
        result=graph.output[0].name if graph.output else "",
        calls=len(model.functions),
    )


def _tensor(proto: Any) -> Tensor:
    name = pb.TensorProto.DataType.Name(proto.data_type)
    return Tensor(tuple(proto.dims), _NAMES.get(name, name.lower()), _SIZES.get(name, 0))


def _attribute_type(attribute: Any) -> str:
    return str(pb.AttributeProto.AttributeType.Name(attribute.type))


def _kind(attribute: Any) -> Kind:
    """What a node declares its output to be."""
    if _attribute_type(attribute) in ("TUPLE", "LIST"):
        return tuple(_kind(v) for v in attribute.values)
    return _tensor(attribute.tensors[0]) if attribute.tensors else None


def _constant(attribute: Any) -> Any:
    kind = _attribute_type(attribute)
    if kind == "TENSORS":
        return _tensor(attribute.tensors[0])
    if kind in ("TUPLE", "LIST"):
        return tuple(_constant(v) for v in attribute.values)
    if kind == "STRING":
        return (attribute.s or b"".join(attribute.strings)).decode(errors="replace")
    if kind == "BOOL" or kind.startswith(("INT", "UINT")):
        return attribute.ints[0] if attribute.ints else attribute.i
    if kind == "FLOAT":
        return attribute.floats[0] if attribute.floats else attribute.f
    if kind == "DOUBLE":
        return attribute.doubles[0] if attribute.doubles else attribute.d
    return ORDER if kind in ("UMONAD", "IOMONAD") else None
