"""Single changes of a ModelProto, in place. Constants and primitives that several nodes share are copied for the one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from kimi_vl.export.mindir import CUSTOM, REFERENCE
from kimi_vl.export.proto import pb

Edit = Callable[[Any], None]
FAULT = "graph:fault"  # no value of an exported graph is named so


def operand(number: int, place: int, value: str) -> Edit:
    """Node `number` takes another value."""

    def edit(model: Any) -> None:
        model.graph.node[number].input[place] = value

    return edit


def swapped(number: int, first: int, second: int) -> Edit:
    """Node `number` takes two operands the other way round."""

    def edit(model: Any) -> None:
        inputs = model.graph.node[number].input
        inputs[first], inputs[second] = inputs[second], inputs[first]

    return edit


def constant(number: int, place: int, change: Callable[[Any], None]) -> Edit:
    """Node `number` takes another constant: its AttributeProto after `change`."""

    def edit(model: Any) -> None:
        node = model.graph.node[number]
        old = next(n for n in model.graph.node if n.output[:1] == [node.input[place]])
        new = type(old).FromString(old.SerializeToString())
        new.name = new.output[0] = node.input[place] = FAULT
        change(new.attribute[0])
        model.graph.node.insert(number, new)

    return edit


def primitive(number: int, change: Callable[[Any], None]) -> Edit:
    """Node `number` has a primitive of its own: the PrimitiveProto after `change`."""

    def edit(model: Any) -> None:
        node = model.graph.node[number]
        old = next(p for p in model.primitives if REFERENCE + p.name == node.op_type)
        new = model.primitives.add()
        new.CopyFrom(old)
        change(new)
        new.name = f"{new.op_type}:fault"
        node.op_type = REFERENCE + new.name

    return edit


def operator(number: int, name: str) -> Edit:
    """Node `number` is another operator, one of the library too if it was."""

    def change(primitive: Any) -> None:
        if primitive.op_type != CUSTOM:
            primitive.op_type = name
            return
        for attribute in primitive.attribute:
            if attribute.name == "func_name":
                attribute.s = name.encode()

    return primitive(number, change)


def redirected(number: int, value: str) -> Edit:
    """Whoever takes what node `number` gives takes another value."""

    def edit(model: Any) -> None:
        given = model.graph.node[number].output[0]
        for node in model.graph.node:
            node.input[:] = [value if v == given else v for v in node.input]
        for output in model.graph.output:
            output.name = value if output.name == given else output.name

    return edit


def shifted(number: int, place: int, declared: Any) -> Edit:
    """Node `number` takes an int32 tensor with 1 added: `declared` is its TensorProto."""

    def edit(model: Any) -> None:
        node = model.graph.node[number]
        model.primitives.add(name="Add:fault", op_type="Add", prim_type=pb.PrimitiveProto.PRIMITIVE_FUNCTION)
        one = pb.NodeProto(op_type="Constant", name=f"{FAULT}.1", output=[f"{FAULT}.1"])
        held = one.attribute.add(name="value", type=pb.AttributeProto.TENSORS).tensors.add()
        held.data_type, held.name = pb.TensorProto.INT32, "value0"
        held.raw_data = (1).to_bytes(4, "little")
        add = pb.NodeProto(op_type=f"{REFERENCE}Add:fault", name=FAULT, output=[FAULT])
        add.input.extend([node.input[place], one.output[0]])
        kind = add.attribute.add(name="shape", type=pb.AttributeProto.TENSORS).tensors.add()
        kind.data_type = declared.data_type
        kind.dims.extend(declared.dims)
        node.input[place] = FAULT
        model.graph.node.insert(number, add)
        model.graph.node.insert(number, one)

    return edit


def cast(number: int, type_id: int, data_type: int) -> Edit:
    """Cast node `number` gives another dtype, and declares it."""

    def change(attribute: Any) -> None:
        set_number(attribute, type_id)

    def edit(model: Any) -> None:
        for attribute in model.graph.node[number].attribute:
            if attribute.name == "shape":
                attribute.tensors[0].data_type = data_type
        constant(number, 1, change)(model)

    return edit


def get_number(attribute: Any) -> int | float:
    """The number in an AttributeProto that holds one."""
    kind = pb.AttributeProto.AttributeType.Name(attribute.type)
    if kind == "FLOAT":
        return attribute.floats[0] if attribute.floats else attribute.f
    if kind == "DOUBLE":
        return attribute.doubles[0] if attribute.doubles else attribute.d
    return attribute.ints[0] if attribute.ints else attribute.i


def set_number(attribute: Any, value: float) -> None:
    """The inverse of :func:`get_number`."""
    kind = pb.AttributeProto.AttributeType.Name(attribute.type)
    several, one = {"FLOAT": ("floats", "f"), "DOUBLE": ("doubles", "d")}.get(kind, ("ints", "i"))
    if getattr(attribute, several):
        getattr(attribute, several)[0] = value
    else:
        setattr(attribute, one, value)
