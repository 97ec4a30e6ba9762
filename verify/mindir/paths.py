"""Ways through a graph: who takes a value, what a value was made from, past everything that only shows it differently."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from functools import cached_property

from .graph import Graph, Node
from .rules import RULES
from .values import Spec, Value

VIEWS = ("BroadcastTo", "Cast", "Depend", "ExpandDims", "Load", "Reshape", "Squeeze")
"""Operators whose result has the numbers of their first input, in another shape or dtype, repeated or at another time."""

_FIRST_ONLY = ("Depend", "Load")  # their other inputs only say what has to be done before


class Paths:
    """The main graph's values, by the names that nodes give them. Inputs and parameters have plain names too."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.nodes = graph.main.nodes

    @cached_property
    def makers(self) -> dict[str, Node]:
        return {node.output: node for node in self.nodes}

    @cached_property
    def order(self) -> dict[str, int]:
        return {node.output: i for i, node in enumerate(self.nodes)}

    @cached_property
    def users(self) -> dict[str, list[Node]]:
        """The nodes that compute with a value, in the order in which they run."""
        users: dict[str, list[Node]] = {}
        for node in self.nodes:
            for value in dict.fromkeys(self.operands(node)):
                users.setdefault(value, []).append(node)
        return users

    @cached_property
    def parameters(self) -> dict[str, str]:
        """Plain name -> name within the graph."""
        return {plain: inner for inner, plain in self.graph.references.items()}

    def operands(self, node: Node) -> tuple[str, ...]:
        """What a node computes with; the parts of a tuple one by one."""
        if node.operator == "UpdateState":
            return ()
        inputs = node.inputs[:1] if node.operator in _FIRST_ONLY else node.inputs
        parts: list[str] = []
        for value in inputs:
            maker = self.makers.get(value)
            grouped = maker is not None and maker.operator in ("MakeTuple", "MakeList")
            parts.extend(maker.inputs if grouped and maker is not None else [value])
        return tuple(parts)

    def takers(self, value: str) -> list[Node]:
        """The nodes that compute with a value or with a view of it, in the order in which they run."""
        found: dict[str, Node] = {}
        left = [value]
        while left:
            for node in self.users.get(left.pop(), ()):
                if node.operator in VIEWS:
                    left.append(node.output)
                elif node.operator not in ("MakeTuple", "MakeList"):
                    found[node.output] = node
        return sorted(found.values(), key=lambda node: self.order[node.output])

    def source(self, value: str, through: Collection[str] = VIEWS) -> str:
        """The value that this one is a view of, or itself."""
        while (node := self.makers.get(value)) and node.operator in through:
            value = node.inputs[0]
        return value

    def part(self, value: str, number: int) -> str | None:
        """Element `number` of a value that is a tuple."""
        for node in self.users.get(value, ()):
            if node.operator == "TupleGetItem" and self.graph.constants.get(node.inputs[1]) == number:
                return node.output
        return None

    def before(self, value: str, ends: Collection[str]) -> set[str]:
        """All values that this one is computed from, not past `ends`."""
        found, left = set(), [value]
        while left:
            name = left.pop()
            if name in found or name in ends:
                continue
            found.add(name)
            if name in self.makers:
                left.extend(self.operands(self.makers[name]))
        return found

    def after(self, value: str) -> set[str]:
        """All values that are computed from this one, but not by way of what is written into a parameter."""
        found = {value}
        for node in self.nodes:
            if not self.writes(node) and not found.isdisjoint(self.operands(node)):
                found.add(node.output)
        return found

    def writes(self, node: Node) -> bool:
        return node.operator in RULES and RULES[node.operator].writes

    def written(self, parameter: str) -> Iterator[Node]:
        """The nodes that write into a parameter, by its plain name."""
        inner = self.parameters.get(parameter)
        for node in self.nodes:
            if self.writes(node) and self.source(node.inputs[0], _FIRST_ONLY) == inner:
                yield node

    def shape(self, value: str) -> tuple[int, ...]:
        """Of a tensor; () of all else."""
        kind = self.makers[value].declared if value in self.makers else self.graph.constants.get(value)
        kind = kind.spec if isinstance(kind, Value) else kind
        return kind.shape if isinstance(kind, Spec) else ()

    def is_number(self, value: str) -> bool:
        """Whether it is a constant of one element."""
        constant = self.graph.constants.get(value)
        return isinstance(constant, float | int) or (
            isinstance(constant, Value) and constant.data.numel() == 1
        )
