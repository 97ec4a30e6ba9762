"""The kinds of change, and where in a graph each can be made.

Each function takes a view, a node and a generator, and yields changes of this one node: what it is in words, and the edit.
Of many possible ones it draws some. None is without effect by construction; what is left out for that reason:

* what only brings order into side effects: UpdateState, a second operand of Load and Depend, monads;
* two operands of an operator that does not care for their order, and another value that is the same one
  (:meth:`View.same`);
* another name for an axis (-1 for the last one), and moving axes of length 1 past each other;
* attributes that only name things (`input_names`, `output_names`) or tell the compiler of side effects and derivatives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import numpy as np

from kimi_vl.export.nodes import Node, Tensor
from kimi_vl.export.proto import pb
from kimi_vl.verify.mindir.values import PROTO_DTYPES, TYPE_IDS, to_numpy
from kimi_vl.verify.mindir.values import constant as decoded

from . import editing
from .editing import Edit, get_number, set_number
from .graphs import SAME, View

Change = tuple[str, Edit]
Kind = Callable[[View, Node, np.random.Generator], Iterator[Change]]

# Their first two operands may be swapped; a norm of a sum begins with the sum.
ADD_AND_NORM = ("AddRmsNorm", "kimi_add_layer_norm", "kimi_add_rms_norm")
COMMUTATIVE = ("Add", *ADD_AND_NORM, "Mul", "Maximum", "Minimum", "Equal", "NotEqual")
SIBLINGS = (
    ("Add", "Sub", "Mul", "Div", "Maximum", "Minimum"),
    ("Greater", "GreaterEqual", "Less", "LessEqual", "Equal", "NotEqual"),
    ("Sigmoid", "SiLU", "GeLU", "Tanh", "Erf", "ReLU"),
    ("kimi_linear", "kimi_linear_gelu_tanh", "kimi_linear_gelu_erf"),
    ("Sin", "Cos"),
    ("Neg", "Abs", "Exp", "Square"),
    ("Rsqrt", "Sqrt"),
    ("AddExt", "SubExt"),
    ("Muls", "Divs"),
    ("ReduceMean", "ReduceMax", "ReduceMin"),
    ("FloorDiv", "FloorMod"),
)
# Where an operator has its axis: the place of the operand, or the name of an attribute.
AXES: dict[str, int | str] = {
    "Concat": 1, "ExpandDims": 1, "Gather": 2, "GatherD": 1, "KVCacheScatterUpdate": 3, "LayerNorm": 3, "ReduceMean": 1,
    "ReduceSum": 1, "Softmax": 1, "Split": 1, "SplitWithSize": 2, "Stack": "axis", "Swiglu": 1, "TopkExt": 2,
    "Unstack": "axis",
}  # fmt: skip
PERMUTATIONS = {"Transpose": (1,)}
BOUNDS = {"StridedSlice": (1, 2, 3, 4, 5, 6, 7, 8)}
SIZES = {"SplitWithSize": (1,), "Reshape": (1,), "BroadcastTo": (1,), "ConstantPadND": (1,)}
OTHERWISE = (AXES, PERMUTATIONS, BOUNDS, SIZES)
NAMES = (
    "input_names", "output_names", "side_effect_mem", "side_effect_io", "side_effect_propagate", "use_locking",
    "autodiff", "multi_output",
)  # fmt: skip
DTYPES = {  # of a Cast: TypeId -> others of its kind
    30: (34,), 34: (35, 33), 35: (34,), 42: (43, 45), 43: (45, 42), 45: (43, 42),
}  # fmt: skip
_AttributeProto = pb.AttributeProto.AttributeType


# Edges ---------------------------------------------------------------------------------------------------------------


def edge(view: View, node: Node, rng: np.random.Generator) -> Iterator[Change]:
    """An operand is another value of its shape and dtype."""
    for place, value in _tensors(view, node):
        others = [v for v in view.before(node, view.nodes.kind(value)) if not view.same(v, value)]
        if others:
            other = others[rng.integers(len(others))]
            yield f"operand {place} is {other}, not {value}", editing.operand(node.number, place, other)


def earlier(view: View, node: Node, rng: np.random.Generator) -> Iterator[Change]:
    """An operand is taken before the operator that gives it, from what that one takes."""
    for place, value in _tensors(view, node):
        maker = view.nodes.makers.get(value)
        for before in _like(view, maker, value) if maker else ():
            what = f"operand {place} is {before}, not what {_shown(view, maker)} makes of it"
            yield what, editing.operand(node.number, place, before)


def swap(view: View, node: Node, rng: np.random.Generator) -> Iterator[Change]:
    """Two operands of one type are the other way round; also the elements of a tuple."""
    for (i, a), (j, b) in combinations(_tensors(view, node), 2):
        if node.operator in COMMUTATIVE and (i, j) == (0, 1):
            continue
        if view.nodes.kind(a) == view.nodes.kind(b) and not view.same(a, b):
            yield f"operands {i} and {j} are swapped", editing.swapped(node.number, i, j)


def item(view: View, node: Node, rng: np.random.Generator) -> Iterator[Change]:
    """Another element of a tuple, of the same type."""
    if node.operator == "TupleGetItem":
        parts = view.nodes.kind(node.inputs[0])
        now = view.nodes.part(node)
        for other, kind in enumerate(parts):
            if other != now and kind == node.kind:
                what = f"takes element {other}, not {now}"
                yield what, editing.constant(node.number, 1, lambda a, n=other: set_number(a, n))


def parameter(view: View, node: Node, rng: np.random.Generator) -> Iterator[Change]:
    """Another parameter of the same shape and dtype: a weight of another layer, another layer's cache."""
    for place, value in view.operands(node):
        if value not in view.nodes.parameters:
            continue
        kind, caches = view.nodes.parameters[value], value in view.caches
        others = [
            p
            for p, t in view.nodes.parameters.items()
            if p != value and t == kind and (p in view.caches) == caches
        ]
        if others:
            other = others[rng.integers(len(others))]
            yield (
                f"takes {other.partition(':')[2]}, not {value.partition(':')[2]}",
                editing.operand(node.number, place, other),
            )


def bypass(view: View, node: Node, rng: np.random.Generator) -> Iterator[Change]:
    """The node is left out: who takes its result takes one of its operands of the same type."""
    for value in _like(view, node, node.output):
        yield (
            f"{_shown(view, node)} is left out, its operand {value} taken instead",
            editing.redirected(node.number, value),
        )


def uncast(view: View, node: Node, rng: np.random.Generator) -> Iterator[Change]:
    """A Cast is left out."""
    if node.operator == "Cast":
        what = f"is left out, {view.tensor(node.inputs[0])} taken for {node.kind}"
        yield what, editing.redirected(node.number, node.inputs[0])


def offset(view: View, node: Node, rng: np.random.Generator) -> Iterator[Change]:
    """Integers that say where, or until where (a slot, a row, an expert), are one more."""
    for place, value in _tensors(view, node):
        kind = view.tensor(value)
        if kind and kind.dtype == "int32" and node.operator != "MakeTuple":
            proto = pb.TensorProto(data_type=pb.TensorProto.INT32, dims=kind.shape)
            yield f"operand {place} is {value} plus 1", editing.shifted(node.number, place, proto)


# Operators and dtypes ------------------------------------------------------------------------------------------------


def operator(view: View, node: Node, rng: np.random.Generator) -> Iterator[Change]:
    """A sibling that takes and gives the same types."""
    for group in SIBLINGS:
        for other in group if node.operator in group else ():
            if other != node.operator:
                yield f"is {other}, not {_shown(view, node)}", editing.operator(node.number, other)


def dtype(view: View, node: Node, rng: np.random.Generator) -> Iterator[Change]:
    """A Cast gives, and declares, another dtype of the same kind."""
    if node.operator == "Cast":
        now = get_number(view.constants[node.inputs[1]])
        protos = {dtype: proto for proto, dtype in PROTO_DTYPES.items()}
        for other in DTYPES.get(int(now), ()):
            change = editing.cast(node.number, other, protos[TYPE_IDS[other]])
            yield f"casts to {TYPE_IDS[other]}, not {TYPE_IDS[int(now)]}", change


# Constants -----------------------------------------------------------------------------------------------------------


def attribute(view: View, node: Node, rng: np.random.Generator) -> Iterator[Change]:
    """A bool is the other one, a string another; of a primitive's attributes a number is one more or less."""
    for place, value in view.operands(node):
        held = view.constants.get(value)
        if held is not None and _kind_of(held) == "BOOL":
            now = bool(get_number(held))
            what = f"operand {place} is {not now}"
            yield what, editing.constant(node.number, place, lambda a, v=int(not now): set_number(a, v))
        elif held is not None and _kind_of(held) == "STRING":
            yield f"operand {place} is another string", editing.constant(node.number, place, _other_string)
    for held in view.primitive(node).attribute:
        if held.name in NAMES or held.name == AXES.get(node.operator):
            continue
        for leaf, found in enumerate(_numbers(held)):
            flips = _kind_of(found) == "BOOL"
            for by in (1 - 2 * int(get_number(found)),) if flips else (1, -1):
                what = f"attribute {held.name}{f'[{leaf}]' if held.values else ''} is {by:+} off"
                yield what, editing.primitive(node.number, _in_attribute(held.name, leaf, by))


def number(view: View, node: Node, rng: np.random.Generator) -> Iterator[Change]:
    """A number among the operands is one more or less, doubled, negated, or 0."""
    for place, value in view.operands(node):
        held = view.constants.get(value)
        if held is None or _elsewhere(node, place) or node.operator in ("TupleGetItem", "Cast"):
            continue
        kind = _kind_of(held)
        if kind in ("FLOAT", "DOUBLE") or kind.startswith(("INT", "UINT")):
            now = get_number(held)
            for what, new in _variants(now):
                text = f"operand {place}, {now:.6g}, is {what}: {new:.6g}"
                yield text, editing.constant(node.number, place, lambda a, v=new: set_number(a, v))


def tensor(view: View, node: Node, rng: np.random.Generator) -> Iterator[Change]:
    """All numbers of a constant tensor, such as the slots of a mask, are one more or less, doubled, negated, or 0."""
    for place, value in view.operands(node):
        held = view.constants.get(value)
        if held is not None and _kind_of(held) == "TENSORS":
            now = _array(held)
            for what, new in _variants(now):
                if not np.array_equal(now, new):
                    shown = f"{now.item():.6g}" if now.size == 1 else f"a constant {view.tensor(value)}"
                    text = f"operand {place}, {shown}, is {what}"
                    text += f": {np.asarray(new).item():.6g}" if now.size == 1 else ""
                    yield text, editing.constant(node.number, place, _filled(new))


def element(view: View, node: Node, rng: np.random.Generator) -> Iterator[Change]:
    """One number of a constant tensor of several is one more."""
    for place, value in view.operands(node):
        held = view.constants.get(value)
        if held is not None and _kind_of(held) == "TENSORS" and _array(held).size > 1:
            new = _array(held).copy()
            at = int(rng.integers(new.size))
            new.reshape(-1)[at] += 1
            text = f"operand {place}, a constant {view.tensor(value)}: element {at} is one more"
            yield text, editing.constant(node.number, place, _filled(new))


def axis(view: View, node: Node, rng: np.random.Generator) -> Iterator[Change]:
    """Another axis."""
    where = AXES.get(node.operator)
    if where is None:
        return
    first = view.nodes.kind(node.inputs[0])
    part = first[0] if isinstance(first, tuple) and first else first
    if part is None:
        return
    rank = len(part.shape) + (node.operator in ("ExpandDims", "Stack"))
    by_name = {a.name: a for a in view.primitive(node).attribute}
    held = by_name.get(where) if isinstance(where, str) else view.constants.get(node.inputs[where])
    if held is None or not _numbers(held):
        return
    now = int(get_number(_numbers(held)[0]))
    for other in range(rank):
        if other != now % rank and not (
            node.operator == "ExpandDims" and _expanded(part, other) == node.kind
        ):
            alone = isinstance(first, tuple) and len(first) == 1
            text = f"axis {other}, not {now}, of {part}{', the only part' if alone else ''}"
            by = other - now
            if isinstance(where, str):
                yield text, editing.primitive(node.number, _in_attribute(where, 0, by))
            else:
                yield text, editing.constant(node.number, where, _plus(0, by))


def permutation(view: View, node: Node, rng: np.random.Generator) -> Iterator[Change]:
    """Two axes of a permutation are swapped."""
    taken = view.tensor(node.inputs[0])
    for place, numbers in _tuples(view, node, PERMUTATIONS):
        for i, j in combinations(range(len(numbers)), 2):
            if taken and taken.shape[numbers[i]] == taken.shape[numbers[j]] == 1:
                continue
            text = f"{numbers} with {i} and {j} swapped"
            yield text, editing.constant(node.number, place, _exchanged(i, j))


def bounds(view: View, node: Node, rng: np.random.Generator) -> Iterator[Change]:
    """The begin, end or stride of a slice is one more or less, or a bit of its masks is the other one."""
    places = BOUNDS.get(node.operator, ())
    helds = [view.constants[node.inputs[place]] for place in places]
    now = [[int(get_number(v)) for v in h.values] if h.values else int(get_number(h)) for h in helds]
    for at, (place, given) in enumerate(zip(places, now)):
        changes: list[tuple[str, Any, Callable[[Any], None]]] = []
        if isinstance(given, list):
            for i, by in product(range(len(given)), (1, -1)):
                what = f"{('begin', 'end', 'stride')[at]} {i}, {given[i]}, is {by:+} off"
                changes.append((what, [n + by * (i == j) for j, n in enumerate(given)], _plus(i, by)))
        else:
            for bit in range(2):
                other = given ^ 1 << bit
                what = f"operand {place}, a mask, {given}, has bit {bit} the other way"
                changes.append((what, other, lambda a, v=other: set_number(a, v)))
        for what, new, change in changes:
            taken = view.tensor(node.inputs[0])
            before, after = (_selected(taken, values) for values in (now, now[:at] + [new] + now[at + 1 :]))
            same = ", and selects the same" if before is not None and before == after else ""
            yield what + same, editing.constant(node.number, place, change)


def _selected(taken: Tensor | None, values: list[Any]) -> list[Any] | None:
    """What a StridedSlice selects along each axis, by Python's rules: a bound past the end is the end."""
    begin, end, strides, begin_mask, end_mask, ellipsis, new_axis, shrink = values
    if taken is None or ellipsis or new_axis or not all(s > 0 for s in strides):
        return None
    found: list[Any] = [range(n) for n in taken.shape]
    for i, n in enumerate(taken.shape[: len(begin)]):
        first = None if begin_mask >> i & 1 else begin[i]
        last = None if end_mask >> i & 1 else end[i]
        if shrink >> i & 1:
            found[i] = begin[i]
        else:
            found[i] = range(*slice(first, last, strides[i]).indices(n))
    return found


def sizes(view: View, node: Node, rng: np.random.Generator) -> Iterator[Change]:
    """Lengths of parts, of a shape or of padding: two are swapped, or one grows as another shrinks."""
    for place, numbers in _tuples(view, node, SIZES):
        for i, j in combinations(range(len(numbers)), 2):
            if numbers[i] != numbers[j]:
                text = f"{numbers} with {i} and {j} swapped"
                yield text, editing.constant(node.number, place, _exchanged(i, j))
            text = f"{numbers} with {i} one more, {j} one less"
            yield text, editing.constant(node.number, place, _moved(i, j))


KINDS: dict[str, Kind] = {
    kind.__name__: kind
    for kind in (
        *(edge, earlier, swap, item, parameter, bypass, uncast, offset, operator, dtype),
        *(attribute, number, tensor, element, axis, permutation, bounds, sizes),
    )
}


# Helpers -------------------------------------------------------------------------------------------------------------


def _tensors(view: View, node: Node) -> Iterator[tuple[int, str]]:
    """Place and value of the operands that are one tensor, computed or given."""
    for place, value in view.operands(node):
        if view.tensor(value) and value not in view.constants and value not in view.nodes.parameters:
            yield place, value


def _shown(view: View, node: Node) -> str:
    """A node's operator, with its operands that are single numbers."""
    numbers = []
    for _, value in view.operands(node):
        held = view.constants.get(value)
        kind = _kind_of(held) if held is not None else ""
        if kind == "TENSORS" and _array(held).size == 1:
            numbers.append(f"{_array(held).item():.6g}")
        elif kind.startswith(("FLOAT", "DOUBLE", "INT", "UINT")):
            numbers.append(f"{get_number(held):.6g}")
    return f"{node.operator}({', '.join(numbers)})" if numbers else node.operator


def _like(view: View, node: Node, value: str) -> list[str]:
    """Operands of a node that have the type of a value, but are not the same."""
    kind = view.tensor(value)
    if kind is None or node.operator in SAME:
        return []
    found = dict.fromkeys(v for _, v in view.operands(node) if view.tensor(v) == kind)
    return [v for v in found if not view.same(v, value)]


def _expanded(kind: Tensor, axis: int) -> Tensor:
    return replace(kind, shape=(*kind.shape[:axis], 1, *kind.shape[axis:]))


def _kind_of(attribute: Any) -> str:
    return str(_AttributeProto.Name(attribute.type))


def _elsewhere(node: Node, place: int) -> bool:
    """Whether another kind has this operand."""
    found = (table.get(node.operator) for table in OTHERWISE)
    return any(place == f or (isinstance(f, tuple) and place in f) for f in found)


def _variants(now: Any) -> list[tuple[str, Any]]:
    """Of a number or an array, without what is the same."""
    now = np.asarray(now)
    if now.dtype == bool:
        return [("negated", ~now)]
    made = [("one more", now + 1), ("one less", now - 1), ("doubled", now * 2)]
    made += [("negated", -now), ("0", now * 0)]
    found: list[tuple[str, Any]] = []
    for what, new in made:
        if not any(np.array_equal(new, old) for old in (now, *(n for _, n in found))):
            found.append((what, new if new.ndim else new.item()))
    return found


def _array(attribute: Any) -> np.ndarray:
    return to_numpy(decoded(attribute).data).copy()


def _filled(array: np.ndarray) -> Callable[[Any], None]:
    def change(attribute: Any) -> None:
        attribute.tensors[0].raw_data = np.ascontiguousarray(array).tobytes()

    return change


def _other_string(attribute: Any) -> None:
    attribute.s = b"ND" if attribute.s != b"ND" else b"BSH"


def _numbers(attribute: Any) -> list[Any]:
    """The attribute itself if it holds a number, or those in its tuple."""
    found = list(attribute.values) or [attribute]
    kinds = [_kind_of(f) for f in found]
    plain = all(k in ("FLOAT", "DOUBLE", "BOOL") or k.startswith(("INT", "UINT")) for k in kinds)
    return found if plain else []


def _tuples(view: View, node: Node, table: dict[str, tuple[int, ...]]) -> Iterator[tuple[int, list[int]]]:
    for place in table.get(node.operator, ()):
        held = view.constants.get(node.inputs[place])
        if held is not None and held.values:
            yield place, [int(get_number(v)) for v in held.values]


def _plus(leaf: int, by: int) -> Callable[[Any], None]:
    def change(attribute: Any) -> None:
        number = _numbers(attribute)[leaf]
        set_number(number, get_number(number) + by)

    return change


def _moved(i: int, j: int) -> Callable[[Any], None]:
    def change(attribute: Any) -> None:
        _plus(i, 1)(attribute)
        _plus(j, -1)(attribute)

    return change


def _exchanged(i: int, j: int) -> Callable[[Any], None]:
    def change(attribute: Any) -> None:
        a, b = _numbers(attribute)[i], _numbers(attribute)[j]
        first, second = get_number(a), get_number(b)
        set_number(a, second)
        set_number(b, first)

    return change


def _in_attribute(name: str, leaf: int, by: int) -> Callable[[Any], None]:
    """A number of a primitive's attribute is so much more."""

    def change(primitive: Any) -> None:
        _plus(leaf, by)(next(a for a in primitive.attribute if a.name == name))

    return change
