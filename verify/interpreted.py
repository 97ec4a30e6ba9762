"""A bundle whose graphs run in the MindIR interpreter: also one for a device that is not here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ..export.bundle import Bundle, Port
from ..export.load import BundleGraphs, MindIRModel
from ..export.weights import SharedWeights, check_files
from ..modeling.cache import RowCache
from ..modeling.engine import Arrays, Engine
from .mindir import Interpreter, Noise, load_graph
from .mindir.interpreter import Arithmetic
from .threads import suited_to


class Watcher(Protocol):
    """Looks on while graphs run."""

    def wanted(self, graph: InterpretedGraph) -> Iterable[str]:
        """What nodes give, see `mindir.graph.Node.output`, whose values are asked for."""

    def seen(
        self, graph: InterpretedGraph, inputs: Arrays, rows: Sequence[RowCache], values: dict[str, Any]
    ) -> None:
        """A graph ran; `rows` still have the lengths from before. A value may be written over by the next run."""


class InterpretedModel(MindIRModel):
    """As :class:`MindIRModel`, for a bundle of any target, with nothing of MindSpore running.

    Attributes:
        watcher: of every graph call, if there is one.
    """

    def __init__(
        self,
        directory: Path,
        bundle: Bundle,
        weights: SharedWeights,
        arithmetic: Arithmetic = "lifted",
        noise: Noise | None = None,
    ) -> None:
        super().__init__(directory, bundle, weights)
        self.operators: set[str] = set()  # of the graphs that were used so far
        self.watcher: Watcher | None = None
        width = self.engine.config.text.hidden_size

        def load(directory: Path, name: str, bundle: Bundle, weights: SharedWeights) -> InterpretedGraph:
            graph = InterpretedGraph(
                directory, name, bundle, weights, arithmetic, noise, width, lambda: self.watcher
            )
            self.operators |= graph.operators
            return graph

        self.engine = Engine(self.engine.config, BundleGraphs(directory, bundle, weights, load))

    @classmethod
    def from_bundle(
        cls,
        directory: str | Path,
        verify: bool | None = None,
        arithmetic: Arithmetic = "lifted",
        noise: Noise | None = None,
    ) -> InterpretedModel:
        """A bundle, checked against its manifest as :meth:`MindIRModel.from_bundle` does.

        Args:
            arithmetic, noise: see :class:`Interpreter`.

        Raises:
            BundleError: it is no bundle, or is damaged.
        """
        path = Path(directory)
        bundle = Bundle.load(path)
        check_files(path, bundle, bool(verify))
        return cls(path, bundle, SharedWeights(path, bundle, verify), arithmetic, noise)


class InterpretedGraph:
    """One graph of a bundle.

    Raises:
        InterpreterError: the graph has an operator without a rule, or a parameter that the bundle does not have.
    """

    def __init__(
        self,
        directory: Path,
        name: str,
        bundle: Bundle,
        weights: SharedWeights,
        arithmetic: Arithmetic,
        noise: Noise | None = None,
        width: int = 0,
        watcher: Callable[[], Watcher | None] = lambda: None,
    ) -> None:
        self.name = name
        self.record = record = bundle.graphs[name]
        self.graph = graph = load_graph(directory / record.file, [port.name for port in record.outputs])
        self._watcher = watcher
        self._caches = record.caches
        self._width = width  # of the network, which says how many threads are worth while
        self._context = record.context or 0
        self._tokens = record.tokens or 0
        self._interpreter = Interpreter(graph, _Weights(bundle, weights), arithmetic, noise)
        self.operators = graph.operators

    def run(self, inputs: Arrays, rows: Sequence[RowCache] = ()) -> list[np.ndarray]:
        """The outputs for these inputs; a text graph reads and extends the caches of `rows`."""
        parameters = self._interpreter.parameters
        for port, layer, held in self._held(rows):
            content = np.stack([row.buffers[layer][: self._context] for row in held])
            parameters.write(port.name, content.reshape(port.shape))
        watcher = self._watcher()
        watched: dict[str, Any] = dict.fromkeys(watcher.wanted(self)) if watcher else {}
        with suited_to(self._width):
            outputs = self._interpreter(inputs, watched)
        if watcher:
            watcher.seen(self, inputs, rows, watched)
        for port, layer, held in self._held(rows):
            written = parameters.read(port.name).reshape(len(held), self._context, -1)
            for row, content in zip(held, written):
                new = slice(row.length, row.length + self._tokens)
                row.buffers[layer][new] = content[new]
        return [_plain(output) for output in outputs.values()]

    def _held(self, rows: Sequence[RowCache]) -> Iterator[tuple[Port, int, Sequence[RowCache]]]:
        """Each cache parameter, its layer, and the rows that it holds: one, or all."""
        if rows:
            per_layer = len(self._caches) // len(rows[0].buffers)
            for i, port in enumerate(self._caches):
                layer, row = divmod(i, per_layer)
                yield port, layer, rows if per_layer == 1 else rows[row : row + 1]


class _Weights(Mapping[str, np.ndarray]):
    """A bundle's weights as the interpreter takes them."""

    def __init__(self, bundle: Bundle, weights: SharedWeights) -> None:
        self._names = bundle.weights
        self._weights = weights

    def __getitem__(self, name: str) -> np.ndarray:
        return self._weights.array(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _plain(output: np.ndarray) -> np.ndarray:
    """fp32 of a shorter float: what the host computes with."""
    return output if output.dtype in (np.float32, np.int32) else output.astype(np.float32)
