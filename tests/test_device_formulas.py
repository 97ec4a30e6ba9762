"""The plain formulas that a device's operators are held against, on the very nodes of the graphs: a second formulation of each
is the interpreter's rule."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import packs
import pytest

from kimi_vl.export import device
from kimi_vl.verify.mindir.graph import read_graph
from kimi_vl.verify.mindir.interpreter import Interpreter

pytestmark = pytest.mark.usefixtures("one_torch_thread")


@pytest.fixture(scope="module")
def operators():
    """The module as it runs in a bundle: its neighbours are found by their names."""
    room = str(Path(device.__file__).parent)
    sys.path.insert(0, room)
    import device_operators

    yield device_operators
    sys.path.remove(room)
    for name in [
        n for n, m in sys.modules.items() if getattr(m, "__file__", None) and room in str(m.__file__)
    ]:
        if not name.startswith("kimi_vl"):
            del sys.modules[name]


def interpreted(operators, call, given):
    """As the device would run a graph of one node, its arithmetic in fp32."""
    model, inputs = operators.single(call)
    graph = read_graph(model)
    parameters = {n: given[f"graph:{n}"].astype(np.float32) for n in graph.parameters}
    lifted = Interpreter(graph, parameters)
    arrays = {o.value.partition(":")[2]: as_declared(given[o.value], o.dtype) for o in inputs}
    return [("float32" if a.dtype.kind == "f" else str(a.dtype), a) for a in lifted(arrays).values()]


def as_declared(array, dtype):
    return np.asarray(array, np.float32 if "float" in dtype else dtype)


@pytest.mark.parametrize("target", ["cpu", "ascend"])
def test_every_operator_of_the_graphs_has_a_formula_that_agrees_with_the_interpreter(operators, target):
    calls = operators.calls(operators.DeviceBundle(packs.bundle(target)))
    assert len(calls) > 50
    for call in calls:
        assert operators.operator(call.node) in operators.FORMULAS, call.name
        found = operators.check(call, lambda call, given: interpreted(operators, call, given))
        assert found["ok"], f"{call.name}: {found['says']}"


def test_a_wrong_operator_is_seen(operators):
    calls = operators.calls(operators.DeviceBundle(packs.bundle("ascend")))
    norm = next(c for c in calls if operators.operator(c.node) == "RmsNorm")

    def wrong(call, given):
        (dtype, y), *rest = interpreted(operators, call, given)
        return [("bfloat16", y * np.float32(1.01)), *rest]

    found = operators.check(norm, wrong)
    assert not found["ok"] and found["says"] == "relative L2 0.01, allowed 0.0039"
    nan = operators.check(
        norm, lambda c, g: [("bfloat16", a * np.nan) for _, a in interpreted(operators, c, g)]
    )
    assert not nan["ok"]
