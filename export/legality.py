"""Whether every node of a graph has a kernel on the products that it is for, and is within that kernel's limits.

The front end that traces a graph is not a device: it accepts operators, dtypes and shapes that no kernel takes. What
kernels take is in ``operators``, from their documents. The check errs on the side of refusal: what no document lists for
a product is refused there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .calls import Call
from .errors import ExportError
from .lint import FREE
from .nodes import ORDER, Nodes, Tensor, flat, read_nodes
from .operators import GE, INSTEAD, KBK, LARGEST_RANK, LIMITS, PRODUCTS, ROWS, Row

RUNTIMES = {KBK: "kernel by kernel", GE: "in a graph engine"}
HALF_PRECISION = "convert the checkpoint with --dtype fp16"


@dataclass(frozen=True)
class Fault:
    """What is wrong with a node, on which product, by which document, and what could be chosen instead."""

    node: str
    operator: str
    product: str
    what: str
    source: str
    instead: str | None


def check(name: str, model: Any, runtime: str, products: Sequence[str]) -> None:
    """Hold every node of a graph against the rows and limits of its operator.

    Args:
        name: of the graph, for messages.
        runtime: who runs it, `KBK` or `GE`.
        products: keys of `PRODUCTS`; the graph must be legal on each.

    Raises:
        ExportError: it is not. The message has the first fault that another choice would mend, or else the first; all such
            choices; and the operators of the faults for which there is none.
    """
    found = [f for call, node in calls(model) for f in faults(call, node, runtime, products)]
    if not found:
        return
    # dtypes are the most numerous faults and say the least
    fault = min(found, key=lambda f: (not f.instead, f.instead == HALF_PRECISION))
    options = sorted({f.instead for f in found if f.instead} - {HALF_PRECISION})
    mended = [f"export with {' '.join(options)}"] if options else []
    mended += [HALF_PRECISION] if any(f.instead == HALF_PRECISION for f in found) else []
    stuck = sorted({f.operator for f in found if not f.instead} - {fault.operator})
    message = f"{name}: node {fault.node} on {fault.product}: {fault.what} ({fault.source})"
    if mended:
        message += f"; {' and '.join(mended)}"
    if stuck:
        message += f"; {'but ' if mended else ''}no option mends what is wrong with {', '.join(stuck)}"
    raise ExportError(message)


def calls(model: Any) -> Iterator[tuple[Call, str]]:
    """The nodes that may start something on a device, and their names in messages."""
    graph = read_nodes(model)
    order = {v for v, constant in graph.constants.items() if constant is ORDER}
    order |= {node.output for node in graph.nodes if node.operator == "UpdateState"}
    for node in graph.nodes:
        if node.operator not in FREE:
            operands = [_operand(graph, value) for value in node.inputs if value not in order]
            yield Call(node.operator, tuple(operands), tuple(flat(node.kind))), str(node)


def _operand(graph: Nodes, value: str) -> Any:
    kind = graph.kind(value)
    return graph.constants.get(value) if kind is None else tuple(flat(kind))


def faults(call: Call, node: str, runtime: str, products: Sequence[str]) -> Iterator[Fault]:
    """What is wrong with a call, for each product."""
    row = ROWS.get(call.operator)
    for product in products:
        if row is None:
            what, source = f"{call.operator} is not in the table of operators", "export/operators.py"
            yield Fault(node, call.operator, product, what, source, None)
            continue
        for what, instead in _faults(call, row, runtime, product):
            yield Fault(node, call.operator, product, what, row.source, instead)


def _faults(call: Call, row: Row, runtime: str, product: str) -> Iterator[tuple[str, str | None]]:
    instead = INSTEAD.get(row.operator)
    listed = row.products[runtime]
    if product not in listed:
        where = f"is listed for {', '.join(listed)} only" if listed else "is listed for no product"
        yield f"{row.operator} {where} {RUNTIMES[runtime]}", instead
        return
    for tensors in (*(call.tensors(i) for i in range(len(call.operands))), call.results):
        for lacking in (t for t in tensors if t.dtype in PRODUCTS[product].lacks):
            yield (
                f"takes or gives {lacking}, but {PRODUCTS[product].title} have no {lacking.dtype}",
                HALF_PRECISION,
            )
            return
    wrong = _mismatch(call, row)
    if wrong:
        yield wrong, None
        return
    for limit in LIMITS.get(row.operator, ()):
        wrong = limit.rule(call) if product in limit.products else None
        if wrong:
            yield wrong, instead


def _mismatch(call: Call, row: Row) -> str | None:
    """Where operands or results are not of the row's kinds and dtypes."""
    least = len(row.operands) - row.operands.count(".?")
    if not least <= len(call.operands) <= len(row.operands):
        return f"has {len(call.operands)} operands, expected {len(row.operands)}"
    bound: dict[str, str] = {}
    for place, token in zip(range(len(call.operands)), row.operands):
        found = call.tensors(place)
        if token.startswith("."):
            if found:
                return f"operand {place} is {found[0]}, expected a constant"
            continue
        if not found and token.endswith("?") and call.operands[place] is None:
            continue
        if not found or (len(found) > 1 and not token.endswith("+")):
            return f"operand {place} is {len(found)} tensors, expected one"
        wrong = _dtypes(f"operand {place}", found, token[0], row, bound)
        if wrong:
            return wrong
    return _results(call, row, bound)


def _results(call: Call, row: Row, bound: dict[str, str]) -> str | None:
    several = row.results[0].endswith("+")
    if not several and len(call.results) != len(row.results):
        return f"has {len(call.results)} results, expected {len(row.results)}"
    for place, result in enumerate(call.results):
        wrong = _dtypes(f"result {place}", (result,), row.results[0 if several else place][0], row, bound)
        if wrong:
            return wrong
    return None


def _dtypes(what: str, found: Sequence[Tensor], letter: str, row: Row, bound: dict[str, str]) -> str | None:
    allowed = row.dtypes[letter]
    for t in found:
        if len(t.shape) > LARGEST_RANK:
            return f"{what} has {len(t.shape)} dimensions, expected at most {LARGEST_RANK}"
        if t.dtype not in allowed:
            return f"{what} is {t}, expected {' or '.join(allowed)}"
        if bound.setdefault(letter, t.dtype) != t.dtype:
            return f"{what} is {t}, but another of the same dtype is {bound[letter]}"
    return None
