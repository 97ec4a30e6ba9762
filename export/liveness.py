"""How much memory a graph's own tensors take at once, from when each is made and last used.

Counted: inputs (all the time), constants (likewise), what every node gives, from that node to the last that takes it, and
outputs to the end. Not counted: parameters, so neither weights nor caches; views and writes into a cache, which give no new
tensor; and what a kernel needs while it works, which no file says. Nodes run in the order of the file, one by one: a
runtime that starts independent branches together holds more.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from .nodes import STRUCTURE, VIEWS, WRITES, Kind, Node, Nodes, flat


@dataclass(frozen=True)
class Live:
    """The height of a graph's memory.

    Attributes:
        nbytes: then.
        node: that ran then; None for a graph without nodes.
        tensors: that were there, largest first: who made each (the name of an input, or a node), what it is, its bytes.
    """

    nbytes: int
    node: Node | None
    tensors: tuple[tuple[str, str, int], ...]


Held = Any
"""The tensors in memory that a value consists of: a number, a tuple of these, or None for none of its own."""


def live(graph: Nodes) -> Live:
    """See the module."""
    sizes: list[int] = []
    made: list[tuple[str, str]] = []
    held: dict[str, Held] = {}
    born, last = [], {}

    def hold(kind: Kind, maker: str, step: int) -> Held:
        if isinstance(kind, tuple):
            return tuple(hold(part, maker, step) for part in kind)
        if kind is None:
            return None
        sizes.append(kind.nbytes)
        made.append((maker, str(kind)))
        born.append(step)
        last[len(sizes) - 1] = step
        return len(sizes) - 1

    end = len(graph.nodes)
    for name, kind in graph.inputs.items():
        held[name] = hold(kind, name.partition(":")[2] or name, 0)
        last[held[name]] = end
    for step, node in enumerate(graph.nodes):
        if node.operator in (*VIEWS, *WRITES):
            held[node.output] = held.get(node.inputs[0])
        elif node.operator in ("TupleGetItem", "ListGetItem"):
            whole = held.get(node.inputs[0])
            held[node.output] = whole[graph.part(node)] if isinstance(whole, tuple) else whole
        elif node.operator in ("MakeTuple", "MakeList"):
            held[node.output] = tuple(held.get(v) for v in node.inputs)
        elif node.operator not in STRUCTURE:
            held[node.output] = hold(node.kind, str(node), step)
        if not node.free:
            for value in node.inputs:
                for tensor in flat(held.get(value)):
                    last[tensor] = max(last[tensor], step)
    for tensor in flat(held.get(graph.result)):
        last[tensor] = end
    constants = sum(t.nbytes for value in graph.constants for t in flat(graph.kind(value)))
    change: defaultdict[int, int] = defaultdict(int)
    for tensor, size in enumerate(sizes):
        change[born[tensor]] += size
        change[last[tensor] + 1] -= size
    now, most, at = constants, constants, 0
    for step in sorted(change):
        now += change[step]
        if now > most:
            most, at = now, step
    there = [(*made[t], sizes[t]) for t in range(len(sizes)) if born[t] <= at <= last[t]]
    return Live(most, graph.nodes[at] if at < end else None, tuple(sorted(there, key=lambda t: -t[2])))
