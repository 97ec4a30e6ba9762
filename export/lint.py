"""What a graph must keep to as a whole: how it uses its caches and inputs, and on Ascend its weights and numbers.

The front end that traces it is no device: it accepts graphs that a device would run wrongly, or with a second copy of
weights or cache. Every rule looks at the MindIR that is about to be written, whoever made it. What single operators take
is in ``legality``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ..modeling.shapes import Ports
from . import mindir
from .errors import ExportError
from .mindir import REFERENCE, plain
from .proto import pb

# Nodes that start nothing on the device: structure, order, and other views of the same memory.
FREE = ("Constant", "Depend", "ExpandDims", "Load", "MakeTuple", "Reshape", "TupleGetItem", "UpdateState")
# Operators that write into their first operand. The first three make GE keep a parameter as RefData.
WRITES = ("KVCacheScatterUpdate", "ScatterNdUpdate", "ScatterUpdate", "InplaceIndexCopy")
# Operators that change how a weight lies or what it is stored in.
COPIES_OF_WEIGHTS = ("Transpose", "Cast", "TensorMove")
# What stands for a parameter itself.
SAME = ("Load", "Depend", "Reshape", "ExpandDims")
LARGEST_CONSTANT = 1 << 20  # bytes
# int64 is slow on a device's vector units: some operators give it or ask for it, and nothing is computed in it.
GIVE_INT64 = ("Cast", "SortExt", "TopkExt")
TAKE_INT64 = (
    "Cast",
    "FusedInferAttentionScore",
    "Gather",
    "GatherD",
    "GroupedMatmul",
    "GroupedMatmulV4",
    "InplaceIndexCopy",
    "KVCacheScatterUpdate",
    "ScatterNdUpdate",
    "ScatterUpdate",
)


@dataclass(frozen=True)
class Lint:
    """A graph with its nodes by what they give.

    Attributes:
        name: of the graph, for messages.
        caches: names of its cache parameters; all other parameters are weights.
        inputs: what the manifest says that the graph takes.
    """

    name: str
    model: Any
    caches: Collection[str]
    inputs: Ports

    @property
    def nodes(self) -> Any:
        return self.model.graph.node

    @cached_property
    def makers(self) -> dict[str, Any]:
        return {output: node for node in self.nodes for output in node.output}

    @cached_property
    def parameters(self) -> dict[str, str]:
        """Value -> plain name."""
        return {p.name: plain(p.name) for p in self.model.graph.parameter}

    def parameter(self, value: str) -> str | None:
        """The parameter that a value is, in any shape; None for what is computed."""
        while value not in self.parameters:
            node = self.makers.get(value)
            if node is None or operator(node) not in SAME:
                return None
            value = node.input[0]
        return self.parameters[value]

    @cached_property
    def computed(self) -> set[str]:
        """The values that the graph's outputs are computed from; not those that only come before them in time."""
        found: set[str] = set()
        left = [output.name for output in self.model.graph.output]
        while left:
            value = left.pop()
            if value in found:
                continue
            found.add(value)
            node = self.makers.get(value)
            if node is not None and operator(node) in ("Depend", "Load"):
                left.append(node.input[0])  # the other is what to wait for
            elif node is not None and operator(node) != "UpdateState":
                left.extend(node.input)
        return found

    def has_int64(self, value: str) -> bool:
        return any(t.data_type == pb.TensorProto.INT64 for t in self.tensors(value))

    def tensors(self, value: str) -> list[Any]:
        """Dims and data type of a value: one TensorProto, or one per element of a tuple."""
        if value in self.makers:
            return [
                t
                for a in self.makers[value].attribute
                if a.name == "shape"
                for t in (*a.tensors, *(t for v in a.values for t in v.tensors))
            ]
        inputs = [t for i in self.model.graph.input if i.name == value for t in i.tensor]
        return inputs or [p for p in self.model.graph.parameter if p.name == value]


def operator(node: Any) -> str:
    """The operator of a node."""
    return str(node.op_type).removeprefix(REFERENCE).partition(":")[0]


def launches(model: Any) -> Counter[str]:
    """How many nodes of each operator start something on the device."""
    return Counter(o for o in map(operator, model.graph.node) if o not in FREE)


def check(name: str, model: Any, caches: Collection[str], inputs: Ports, device: bool = True) -> None:
    """Hold a graph against every rule.

    Args:
        device: it is for one; if not, only the rules count that hold wherever a graph runs.

    Raises:
        ExportError: it breaks one; the message names the graph and the node.
    """
    lint = Lint(name, model, caches, inputs)
    for rule in RULES if device else EVERYWHERE:
        for node, what in rule(lint):
            raise ExportError(f"{name}: node {node}: {what}")


Broken = Iterator[tuple[str, str]]
"""A node, and what is wrong with it."""


def unordered_caches(lint: Lint) -> Broken:
    """Each cache is written by one operator that takes it as it is, and read only as what that operator gives.

    So every read has an edge from the write. A read of the parameter itself could run before it, whatever the order of
    side effects says; and a write whose result nothing takes would order nothing.
    """
    writes: dict[str, list[Any]] = {cache: [] for cache in lint.caches}
    for node in lint.nodes:
        for place, value in enumerate(node.input):
            cache = lint.parameters.get(value)
            if cache is None or cache not in lint.caches:
                continue
            if operator(node) in WRITES and place == 0:
                writes[cache].append(node)
            elif operator(node) == "TensorMove":
                yield named(node), f"copies {cache}, which must be written where it is"
            else:
                yield named(node), f"reads {cache} without waiting for its write; read what the write gives"
    for cache, nodes in writes.items():
        if len(nodes) != 1:
            yield cache, f"is written {len(nodes)} times, expected once, by one of {', '.join(WRITES)}"
        elif nodes[0].output[0] not in lint.computed:
            yield named(nodes[0]), f"writes {cache}, but no output is computed from what it gives"


def changed_weights(lint: Lint) -> Broken:
    """No weight is transposed, cast or copied: it would be held twice, or changed at every call."""
    for node in lint.nodes:
        if operator(node) in COPIES_OF_WEIGHTS:
            weight = lint.parameter(node.input[0])
            if weight is not None and weight not in lint.caches:
                yield (
                    named(node),
                    f"changes the weight {weight}; the conversion stores it as the graph needs it",
                )


def large_constants(lint: Lint) -> Broken:
    """No constant holds more than `LARGEST_CONSTANT` bytes."""
    for node in lint.nodes:
        if operator(node) == "Constant" and node.ByteSize() > LARGEST_CONSTANT:
            yield (
                named(node),
                f"is a constant of {node.ByteSize()} bytes, expected at most {LARGEST_CONSTANT}",
            )


def int64_arithmetic(lint: Lint) -> Broken:
    """int64 comes from a cast or as the places of a sort, and goes to what asks for it."""
    for node in lint.nodes:
        if operator(node) in FREE:
            continue
        if operator(node) not in GIVE_INT64 and lint.has_int64(node.output[0]):
            yield (
                named(node),
                "computes in int64; compute in int32 and cast for the operator that takes int64",
            )
        if operator(node) not in TAKE_INT64 and any(map(lint.has_int64, node.input)):
            yield named(node), "takes int64, which it does not need; cast to int32 before it"


def bindings(lint: Lint) -> Broken:
    """Inputs are the manifest's, in its order; every parameter is bound once: a cache to nothing, a weight to its bytes."""
    found = mindir.inputs(lint.model)
    if list(found.items()) != list(lint.inputs.items()):
        yield "inputs", f"are {found}, expected {lint.inputs}"
    for name, times in Counter(plain(p.name) for p in lint.model.graph.parameter).items():
        if times > 1:
            yield name, f"is {times} parameters, expected one"
    places: dict[mindir.Place, str] = {}
    for name, place in mindir.pointing(lint.model).items():
        if name in lint.caches:
            yield name, f"is a cache, but takes its content from {place[0]}"
        if place in places:
            yield name, f"takes its bytes from where {places[place]} does, {place[0]} at {place[1]}"
        places[place] = name
    for parameter in lint.model.graph.parameter:
        name = plain(parameter.name)
        if parameter.HasField("raw_data"):
            yield name, "has its data in the graph, expected in a shard"
        if places and name not in lint.caches and name not in places.values():
            yield name, "has no data, while other parameters have"


def named(node: Any) -> str:
    """A node in a message: its number in the graph and its operator."""
    return f"{plain(node.output[0])} ({operator(node)})"


EVERYWHERE: tuple[Callable[[Lint], Broken], ...] = (bindings, unordered_caches)
RULES: tuple[Callable[[Lint], Broken], ...] = (
    *EVERYWHERE,
    changed_weights,
    large_constants,
    int64_arithmetic,
)
