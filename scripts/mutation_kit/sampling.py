"""Which faults are made: every operator of a bundle's graphs in proportion to its nodes, but a few of each at least."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from kimi_vl.export import mindir
from kimi_vl.export.bundle import Bundle
from kimi_vl.export.nodes import Node

from .graphs import View
from .kinds import KINDS

LEAST = 4  # faults of an operator, if it can have so many
TRIES = 40  # draws for one fault, before the next kind of change has its turn


@dataclass(frozen=True)
class Mutant:
    """A graph with one fault, as the file would hold it."""

    target: str
    graph: str
    operator: str
    kind: str
    node: str
    what: str
    content: bytes

    def __str__(self) -> str:
        return f"{self.target}, {self.graph}, {self.node} ({self.operator}): {self.kind}, {self.what}"


class Graphs:
    """A bundle's graphs, to be changed in copies."""

    def __init__(self, directory: Path) -> None:
        self.bundle = Bundle.load(directory)
        self.views = {
            name: View(mindir.read(directory / graph.file), [port.name for port in graph.caches])
            for name, graph in self.bundle.graphs.items()
        }
        self.nodes: dict[str, list[tuple[str, Node]]] = {}
        for name, view in self.views.items():
            for node in view.counting:
                self.nodes.setdefault(node.operator, []).append((name, node))

    def quotas(self, count: int, least: int = LEAST) -> dict[str, int]:
        """How many faults of each operator make about `count` together."""
        total = sum(map(len, self.nodes.values()))
        return {o: max(least, round(count * len(n) / total)) for o, n in sorted(self.nodes.items())}

    def mutants(
        self, count: int, seed: int, kinds: Collection[str] = (), least: int = LEAST
    ) -> Iterator[Mutant]:
        """Different mutants, the same ones for the same seed; an operator that has fewer possible faults gives fewer.

        Args:
            kinds: names of :data:`KINDS`; default all.
        """
        seen: set[bytes] = set()
        for operator, quota in self.quotas(count, least).items():
            rng = np.random.default_rng([seed, zlib.crc32(f"{self.bundle.target} {operator}".encode())])
            left = [k for k in KINDS if not kinds or k in kinds]
            rng.shuffle(left)
            made = 0
            while left and made < quota:
                kind = left.pop(0)
                mutant = self._draw(operator, kind, rng, seen)
                if mutant is not None:
                    left.append(kind)  # every kind has its turn
                    made += 1
                    yield mutant

    def _draw(self, operator: str, kind: str, rng: np.random.Generator, seen: set[bytes]) -> Mutant | None:
        """A new mutant of a node drawn from all graphs; None: no node has one of this kind."""
        nodes = self.nodes[operator]
        for i in rng.permutation(len(nodes))[:TRIES]:
            name, node = nodes[i]
            view = self.views[name]
            changes = list(KINDS[kind](view, node, rng))
            if not changes:
                continue
            what, edit = changes[rng.integers(len(changes))]
            model = copied(view.model)
            edit(model)
            content = mindir.serialise(model)
            if content in seen or content == mindir.serialise(view.model):
                continue
            seen.add(content)
            return Mutant(self.bundle.target, name, operator, kind, node.output, what, content)
        return None


def copied(model: Any) -> Any:
    new = type(model)()
    new.CopyFrom(model)
    return new


def by_operator(mutants: Collection[Mutant]) -> Counter[str]:
    return Counter(m.operator for m in mutants)
