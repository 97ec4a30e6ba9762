"""A MindIR proto as a graph: nodes in the order in which they run, with decoded constants and declared types."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ...export import mindir
from .errors import InterpreterError
from .values import Spec, constant, declared, described, tensor_spec

CALL = "call"
"""Operator of a node that calls a sub-graph; its first input is the closure."""


@dataclass(frozen=True)
class Node:
    """One operator call.

    Attributes:
        operator: the primitive's name, or `CALL`.
        inputs: names of values; `last_use` are those that no later node of the graph needs.
        attributes: arguments that older primitives keep with themselves.
        declared: the type of the output, see `values.declared`.
    """

    name: str
    operator: str
    inputs: tuple[str, ...]
    output: str
    attributes: dict[str, Any]
    declared: Any
    last_use: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Function:
    """The main graph or a sub-graph: names of its inputs, its nodes, the name of its result."""

    name: str
    inputs: tuple[str, ...]
    nodes: tuple[Node, ...]
    result: str


@dataclass(frozen=True)
class Graph:
    """A MindIR file.

    Attributes:
        inputs, parameters, outputs: plain name -> Spec; outputs have no names in the file, see :func:`load_graph`.
        values: name within the graph -> plain name, of the inputs, and likewise `references` of the parameters.
        main: what runs; `functions` by name are called from it.
        constants: by name, shared by all functions.
    """

    inputs: dict[str, Spec]
    parameters: dict[str, Spec]
    outputs: dict[str, Spec]
    values: dict[str, str]
    references: dict[str, str]
    main: Function
    functions: dict[str, Function]
    constants: dict[str, Any] = field(repr=False)

    @property
    def nodes(self) -> list[Node]:
        """All nodes, those of sub-graphs too."""
        return [n for f in (self.main, *self.functions.values()) for n in f.nodes]

    @property
    def operators(self) -> set[str]:
        return {n.operator for n in self.nodes}

    def describe(self, node: Node) -> str:
        """A node for an error message: its operator, its name and what it takes."""
        types = {n.output: n.declared for n in self.nodes} | self.constants
        types |= {k: self.inputs[v] for k, v in self.values.items()}
        types |= {k: self.parameters[v] for k, v in self.references.items()}
        return f"{node.operator} ({node.name}) of {', '.join(described(types.get(i)) for i in node.inputs)}"


def load_graph(path: str | Path, outputs: Sequence[str] = ()) -> Graph:
    """The graph of a MindIR file; parameters' data is not read.

    Args:
        outputs: what to call the outputs, in order. Default: `output0`, `output1`, ...

    Raises:
        BundleError: the file is no MindIR.
        InterpreterError: it holds what is not supported, or other outputs than named.
    """
    return read_graph(mindir.read(Path(path)), outputs)


def read_graph(model: Any, outputs: Sequence[str] = ()) -> Graph:
    """The graph of a ModelProto. See :func:`load_graph`."""
    primitives = {p.name: p for p in model.primitives}
    constants: dict[str, Any] = {}
    for proto in (model.graph, *model.functions):
        for node in proto.node:
            if node.op_type == "Constant":
                constants[node.output[0]] = constant(node.attribute[0])
    functions = {f.name: _function(f, primitives) for f in model.functions}
    specs = _outputs(model.graph.output)
    names = tuple(outputs) or tuple(f"output{i}" for i in range(len(specs)))
    if len(names) != len(specs):
        raise InterpreterError(
            f"the graph has {len(specs)} outputs, expected {len(names)}: {', '.join(names)}"
        )
    return Graph(
        inputs={mindir.plain(i.name): tensor_spec(i.tensor[0]) for i in model.graph.input},
        parameters={mindir.plain(p.name): tensor_spec(p) for p in model.graph.parameter},
        outputs=dict(zip(names, specs)),
        values={i.name: mindir.plain(i.name) for i in model.graph.input},
        references={p.name: mindir.plain(p.name) for p in model.graph.parameter},
        main=_function(model.graph, primitives),
        functions=functions,
        constants=constants,
    )


def _outputs(protos: Sequence[Any]) -> list[Spec]:
    if len(protos) != 1:
        raise InterpreterError(
            f"the graph has {len(protos)} results, expected one, a tensor or a tuple of tensors"
        )
    (output,) = protos
    found = declared(output.attr_info) if output.HasField("attr_info") else None
    specs = list(found) if found else [tensor_spec(t) for t in output.tensor]
    if not specs or not all(isinstance(s, Spec) for s in specs):
        raise InterpreterError("the graph's result is no tensor and no flat tuple of tensors")
    return specs


def _function(proto: Any, primitives: dict[str, Any]) -> Function:
    nodes = []
    used = {o.name for o in proto.output}  # going backwards: what the nodes after this one need
    for node in reversed(proto.node):
        if node.op_type == "Constant":
            continue
        made = _node(node, primitives)
        last = frozenset(made.inputs) - used
        used |= last
        nodes.append(replace(made, last_use=last))
    if len(proto.output) != 1:
        raise InterpreterError(f"{proto.name}: has {len(proto.output)} results, expected 1")
    return Function(
        proto.name, tuple(i.name for i in proto.input), tuple(reversed(nodes)), proto.output[0].name
    )


def _node(proto: Any, primitives: dict[str, Any]) -> Node:
    if not proto.op_type.startswith(mindir.REFERENCE) or len(proto.output) != 1:
        raise InterpreterError(f"{proto.name}: a node of the type {proto.op_type} is not supported")
    reference = proto.op_type.removeprefix(mindir.REFERENCE)
    types = [declared(a) for a in proto.attribute if a.name == "shape"]
    kind = types[0] if types else None
    primitive = primitives.get(reference)
    if primitive is None:  # the name of a closure, or of a function
        inputs = (reference, *proto.input)
        return Node(proto.name, CALL, inputs, proto.output[0], {}, kind)
    attributes = {}
    for attribute in primitive.attribute:
        with suppress(InterpreterError):  # of a kind that no rule reads
            attributes[attribute.name] = constant(attribute)
    return Node(proto.name, mindir.operator(primitive), tuple(proto.input), proto.output[0], attributes, kind)
