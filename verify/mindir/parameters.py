"""A graph's parameters: read where they lie each time they are needed, held only where the graph writes them."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from .errors import InterpreterError
from .graph import Graph
from .rules import RULES
from .values import LOW, Value, from_numpy, name, to_numpy


class Parameters:
    """Arrays by plain name, checked against what the graph declares.

    Args:
        arrays: fp16 and bf16 arrays may stand for fp32 parameters. Those that the graph writes may be left out; they
            begin as zeros.
        lifted: hold what is written in fp32 where the graph declares bf16 or fp16.

    Raises:
        InterpreterError: the graph has a parameter that is not in `arrays`.
    """

    def __init__(self, graph: Graph, arrays: Mapping[str, np.ndarray], lifted: bool) -> None:
        self._graph = graph
        self._arrays = arrays
        self._lifted = lifted
        self._state: dict[str, torch.Tensor] = {}
        self.written = _written(graph)
        for parameter, spec in graph.parameters.items():
            if parameter in arrays:
                if parameter in self.written:
                    self.write(parameter, arrays[parameter])
            elif parameter in self.written:
                self._state[parameter] = torch.zeros(spec.shape, dtype=self._held(spec.dtype))
            else:
                raise InterpreterError(f"{parameter}: the graph takes {spec}, but no such array was given")

    def value(self, parameter: str) -> Value:
        """A parameter as a value of the graph."""
        spec = self._graph.parameters[parameter]
        if parameter in self._state:
            return Value(self._state[parameter], spec.dtype, parameter)
        data = self._checked(parameter, self._arrays[parameter])
        return Value(data.to(spec.dtype), spec.dtype, parameter)

    def read(self, parameter: str) -> np.ndarray:
        """The present content."""
        return to_numpy(self.value(parameter).data)

    def write(self, parameter: str, content: np.ndarray) -> None:
        """New content of a parameter that the graph writes; it is copied. fp32 may stand for bf16 or fp16, as with inputs.

        Raises:
            InterpreterError: the graph only reads it, or it has another shape or dtype.
        """
        if parameter not in self.written:
            raise InterpreterError(
                f"{parameter}: is not written by the graph, so its content is the array that was given"
            )
        dtype = self._held(self._graph.parameters[parameter].dtype)
        self._state[parameter] = self._checked(parameter, content).to(dtype, copy=True)

    def update(self, parameter: str, data: torch.Tensor) -> None:
        """What a node wrote."""
        self._state[parameter] = data

    def _held(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32 if self._lifted and dtype in LOW else dtype

    def _checked(self, parameter: str, array: np.ndarray) -> torch.Tensor:
        spec = self._graph.parameters[parameter]
        data = from_numpy(array)
        wider = spec.dtype == torch.float32 and data.dtype in LOW
        content = parameter in self.written and spec.dtype in LOW and data.dtype == torch.float32
        if tuple(data.shape) != spec.shape or not (data.dtype == spec.dtype or wider or content):
            raise InterpreterError(
                f"{parameter}: the graph takes {spec}, but the array is {name(data.dtype)} {list(data.shape)}"
            )
        return data


def _written(graph: Graph) -> set[str]:
    """The parameters that nodes of the graph write: directly, after a Depend, or what another write gave."""
    producers = {node.output: node for node in graph.nodes}
    writers = {node.output for node in graph.nodes if node.operator in RULES and RULES[node.operator].writes}
    found = set()
    for writer in writers:
        target = producers[writer].inputs[0]
        while target in producers and (target in writers or producers[target].operator == "Depend"):
            target = producers[target].inputs[0]
        if target in graph.references:
            found.add(graph.references[target])
    return found
