"""A graph as one sees it who is about to change one thing in it: what has which type, what is the same value, what counts."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cached_property
from typing import Any

from kimi_vl.export.lint import Lint
from kimi_vl.export.mindir import REFERENCE
from kimi_vl.export.nodes import ORDER, WRITES, Node, Nodes, Tensor, read_nodes

# They give their first operand; the second one only says what comes before.
SAME = ("Load", "Depend")

# If these give the shape that they take, they give all of it as it is.
WHOLE = ("BroadcastTo", "StridedSlice")


class View:
    """Of a ModelProto that is not changed.

    Attributes:
        caches: names of the parameters that the graph writes into, as they stand in the graph.
    """

    def __init__(self, model: Any, caches: Collection[str]) -> None:
        self.model = model
        self.nodes: Nodes = read_nodes(model)
        self.caches = frozenset(p for p in self.nodes.parameters if p.partition(":")[2] in caches)
        self._numbers: dict[Any, int] = {}
        self._values: dict[str, int] = {}

    @cached_property
    def counting(self) -> list[Node]:
        """The nodes that an output is computed from. What the others do is to bring order into side effects."""
        computed = Lint("", self.model, (), {}).computed
        return [n for n in self.nodes.nodes if n.output in computed and n.operator != "UpdateState"]

    @cached_property
    def constants(self) -> dict[str, Any]:
        """The attribute that holds each constant."""
        return {n.output[0]: n.attribute[0] for n in self.model.graph.node if n.op_type == "Constant"}

    @cached_property
    def _primitives(self) -> dict[str, Any]:
        return {p.name: p for p in self.model.primitives}

    def primitive(self, node: Node) -> Any:
        """The primitive of a node, which other nodes may share."""
        return self._primitives[self.model.graph.node[node.number].op_type.removeprefix(REFERENCE)]

    def operands(self, node: Node) -> Iterator[tuple[int, str]]:
        """Place and value of each operand that a node's result depends on."""
        places = node.inputs[:1] if node.operator in SAME else node.inputs
        for place, value in enumerate(places):
            maker = self.nodes.makers.get(value)
            if self.nodes.constants.get(value) is not ORDER and not (
                maker and maker.operator == "UpdateState"
            ):
                yield place, value

    def tensor(self, value: str) -> Tensor | None:
        """The type of a value that is one tensor."""
        kind = self.nodes.kind(value)
        return kind if isinstance(kind, Tensor) else None

    def before(self, node: Node, kind: Tensor) -> list[str]:
        """Values of a type that are there when a node runs; no constants, and no parameters, which are loaded first."""
        return [n for n, t in self.nodes.inputs.items() if t == kind] + [
            n.output for n in self.nodes.nodes if n.number < node.number and n.kind == kind
        ]

    def same(self, a: str, b: str) -> bool:
        """Whether two values are one by construction: the same operators on the same values, in whatever shape."""
        return self._value(a) == self._value(b)

    def _gives_its_operand(self, node: Node) -> bool:
        whole = node.operator in WHOLE and self.tensor(node.inputs[0]) == node.kind
        return node.operator in SAME or whole

    def _value(self, value: str) -> int:
        if value not in self._values:
            self._values[value] = self._number(value)
        return self._values[value]

    def _number(self, value: str) -> int:
        node = self.nodes.makers.get(value)
        key: Any = value
        if value in self.constants:
            held = self.constants[value].SerializeToString(deterministic=True)
            key = ("constant", held)
        elif node is not None and self._gives_its_operand(node):
            return self._value(node.inputs[0])
        elif node is not None and node.operator == "Reshape":
            inner = node.inputs[0]
            while (maker := self.nodes.makers.get(inner)) and maker.operator in (*SAME, "Reshape"):
                inner = maker.inputs[0]
            if self.tensor(inner) == node.kind:
                return self._value(inner)
            key = ("Reshape", self._value(inner), node.kind)
        elif node is not None and node.operator not in WRITES:
            attributes = tuple(
                a.SerializeToString(deterministic=True) for a in self.primitive(node).attribute
            )
            key = (node.operator, attributes, tuple(self._value(v) for v in node.inputs))
        return self._numbers.setdefault(key, len(self._numbers))
