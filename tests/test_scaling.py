"""Graphs that follow from two traced ones are, byte for byte, what tracing them gives; what differs in more is traced."""

from __future__ import annotations

import bundles
import mindspore as ms
import numpy as np
import pytest
from mindspore import nn, ops
from traced import trace

from kimi_vl.export import mindir, plan_export
from kimi_vl.export.plan import BundlePlan, GraphPlan, open_converted
from kimi_vl.export.scaling import Lengths, Unlike, scaled
from kimi_vl.export.trace import Tracer

needs_ascend = pytest.mark.skipif(not hasattr(ms, "DeviceCtx"), reason="Ascend graphs need MindSpore 2.10")
CASES = [
    ("cpu", "vision"),
    ("cpu", "decode"),
    pytest.param("ascend", "prefill", marks=needs_ascend),
    pytest.param("ascend", "decode", marks=needs_ascend),
]


def families(target: str, **changes) -> tuple[BundlePlan, dict[str, list[GraphPlan]]]:
    """Three lengths of each kind, of which the middle one is also the chunk twice or a width of the model."""
    sizes = {"seq": (96, 128, 200), "prefill_chunk": 64, "image_patches": (16, 64, 128)}
    weights = open_converted(bundles.converted("tiny8-bf16"))
    made = plan_export(weights, **{**sizes, **changes}, target=target)
    return made, {family[0].kind: family for family, _ in made.families()}


@pytest.fixture
def traces(monkeypatch) -> list[str]:
    """Names of the graphs that were traced."""
    names: list[str] = []
    really = Tracer.trace

    def counted(self, graph):
        names.append(graph.name)
        return really(self, graph)

    monkeypatch.setattr(Tracer, "trace", counted)
    return names


@pytest.mark.parametrize("target, kind", CASES)
def test_the_graph_between_is_what_tracing_gives(target, kind, traces):
    made, of_kind = families(target)
    tracer = Tracer(made.config, made.target, 1)
    smallest, middle, largest = of_kind[kind]
    found = {graph.name: mindir.serialise(model) for graph, model in tracer.family(of_kind[kind])}
    assert set(found) == {smallest.name, middle.name, largest.name}
    assert traces == [largest.name, smallest.name]
    assert found[middle.name] == mindir.serialise(tracer.trace(middle))


def test_taps_and_rows_of_a_batch_are_no_obstacle(traces):
    made, _ = families("cpu", taps=True, batch=2)
    family = next(f for f, _ in made.families() if f[0].taps and f[0].kind == "decode")
    tracer = Tracer(made.config, made.target, 2)
    found = {graph.name: mindir.serialise(model) for graph, model in tracer.family(family)}
    assert len(found) == 3 and len(traces) == 2
    assert found["decode-128-taps"] == mindir.serialise(tracer.trace(family[1]))


def test_where_the_number_of_blocks_changes_graphs_are_traced(traces, monkeypatch):
    monkeypatch.setattr("kimi_vl.modeling.kernels.plain.SCORE_BLOCK", 1 << 12)
    monkeypatch.setattr("kimi_vl.modeling.kernels.plain.SMALLEST_BLOCK", 32)
    with bundles.plain_graphs():
        made, of_kind = families("cpu")
    tracer = Tracer(made.config, made.target, 1)
    assert {graph.name for graph, _ in tracer.family(of_kind["vision"])} == set(traces)


# What is unlike ------------------------------------------------------------------------------------------------------


class Shifted(nn.Cell):
    """A length that is the input's and one more."""

    def construct(self, x):
        return ops.concat((x, x[:1]), 0)


class Factor(nn.Cell):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def construct(self, x):
        return x * self.factor


class Longer(nn.Cell):
    """As many operations as the input is long."""

    def construct(self, x):
        for _ in range(x.shape[0]):
            x = ops.square(x)
        return x


def protos(*cells: nn.Cell):
    return [trace(cell, np.zeros((n, 3), np.float32)) for cell, n in zip(cells, (4, 8))]


@pytest.mark.parametrize(
    "cells",
    [(Shifted(), Shifted()), (Factor(1.5), Factor(3.0)), (Longer(), Longer())],
    ids=["a sum", "a number with a fraction", "other nodes"],
)
def test_what_is_not_a_length_is_unlike(cells):
    with pytest.raises(Unlike):
        scaled(*protos(*cells), Lengths(4, 8, 6))


def test_a_fraction_is_unlike():
    first, last = protos(Factor(1.5), Factor(1.5))
    assert mindir.inputs(scaled(first, last, Lengths(4, 8, 6)))["x"][0] == (6, 3)
    with pytest.raises(Unlike):
        Lengths(4, 8, 6).number(2, 5)
    with pytest.raises(Unlike):
        Lengths(4, 8, 6).number(2, 4) and Lengths(4, 8, 7).number(2, 4)


def test_tables_of_places_are_scaled_and_other_tensors_are_unlike():
    def places(n: int) -> bytes:
        return np.arange(n, dtype=np.int32).tobytes()

    assert Lengths(4, 8, 6).places(places(4), places(8)) == places(6)
    with pytest.raises(Unlike):
        Lengths(4, 8, 6).places(places(4), places(8)[::-1])
