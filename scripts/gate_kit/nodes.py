"""Faults of a finished graph: nodes of its MindIR rewired or replaced, its hash made right again.

What a graph pass, an editor or another version of MindSpore could do to it. Each takes the proto and the graph's name in
the manifest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from kimi_vl.export.lint import Lint, operator
from kimi_vl.export.mindir import REFERENCE
from kimi_vl.export.plan import TAPS

from .fault import Fault

Change = Callable[[Any, str], object]
NORMS = ("RmsNorm", "AddRmsNorm", "LayerNorm")


def norms(model: Any, weight: str) -> Iterator[Any]:
    """The norms with this weight."""
    lint = Lint("", model, (), {})
    for node in model.graph.node:
        if operator(node) in NORMS and any(lint.parameter(value) == weight for value in node.input):
            yield node


def outputs(model: Any, node: Any) -> dict[int, str]:
    """What the elements that are taken of a node's tuple are called."""
    number = {n.output[0]: n.attribute[0] for n in model.graph.node if n.op_type == "Constant"}
    return {
        _value(number[n.input[1]]): n.output[0]
        for n in model.graph.node
        if operator(n) == "TupleGetItem" and n.input[0] == node.output[0]
    }


def _value(attribute: Any) -> int:
    return attribute.i or sum(t.int64_data[0] if t.int64_data else 0 for t in attribute.tensors)


def redirect(model: Any, old: str, new: str) -> None:
    """All nodes that take `old` take `new`."""
    for node in model.graph.node:
        for i, value in enumerate(node.input):
            if value == old:
                node.input[i] = new


def norm_missing(model: Any, graph: str, weight: str) -> None:
    """What was normed goes on as it is: the input, or of AddRmsNorm the sum."""
    for node in list(norms(model, weight)):
        taken = outputs(model, node)
        redirect(model, taken[0], taken[2] if operator(node) == "AddRmsNorm" else node.input[0])


def only(change: Change, wanted: Callable[[str], bool]) -> Change:
    def changed(model: Any, graph: str) -> None:
        if wanted(graph):
            change(model, graph)

    return changed


def replaced(model: Any, graph: str, old: str, new: str, width: int) -> None:
    """One operator for another that takes and gives the same, where results have a last axis of `width`."""
    lint = Lint("", model, (), {})
    for node in model.graph.node:
        if operator(node) == old and lint.tensors(node.output[0])[0].dims[-1] == width:
            was = next(p for p in model.primitives if REFERENCE + p.name == node.op_type)
            made = model.primitives.add()
            made.CopyFrom(was)
            made.name, made.op_type = f"{new}:faulty", new
            node.op_type = REFERENCE + made.name


def residual_dropped(model: Any, graph: str, weight: str) -> None:
    """The sum that goes on beside a norm is its second operand alone."""
    for node in list(norms(model, weight)):
        redirect(model, outputs(model, node)[2], node.input[1])


NORM = "language_model.model.norm.weight"
POST = "language_model.model.layers.1.post_attention_layernorm.weight"


def _graph(name: str, what: str, place: str, change: Change) -> Fault:
    return Fault(name, what, "graph", place, change)


FAULTS = (
    _graph("final-norm-missing", "final norm missing", "logits", partial(norm_missing, weight=NORM)),
    _graph(
        "final-layernorm-missing",
        "final_layernorm of the tower missing",
        "vision_out",
        partial(norm_missing, weight="vision_tower.encoder.final_layernorm.weight"),
    ),
    _graph(
        "residual-dropped",
        "residual of layer 1 dropped after attention",
        "layers.1",
        partial(residual_dropped, weight=POST),
    ),
    _graph(
        "shipped-alone",
        "final norm missing in the graphs without taps alone",
        "logits",
        only(partial(norm_missing, weight=NORM), lambda graph: not graph.endswith(TAPS)),
    ),
    _graph(
        "longest-context-alone",
        "mask one short in the decode graphs of the longest context alone",
        "layers.0",
        only(
            partial(replaced, old="Greater", new="GreaterEqual", width=128),
            lambda graph: graph.startswith("decode-128"),
        ),
    ),
)
