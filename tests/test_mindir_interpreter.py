"""The interpreter on whole graphs: a bundle's, against Torch and MindSpore, and graphs that something is wrong with."""

from __future__ import annotations

import bundles
import mindspore as ms
import numpy as np
import pytest
from golden import check_cache, check_case, load_case, rel_l2
from mindspore import nn
from traced import Apply, interpreter, run, trace

from kimi_vl.export import MindIRModel, mindir
from kimi_vl.modeling.cache import RowCache
from kimi_vl.modeling.parameters import empty_parameter
from kimi_vl.verify.interpreted import InterpretedGraph, InterpretedModel
from kimi_vl.verify.mindir import Graph, Interpreter, InterpreterError, load_graph, read_graph

BF16, FP32 = "tiny8-bf16", "tiny8-fp32"
pytestmark = pytest.mark.usefixtures("one_torch_thread")


# Bundles -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("checkpoint", "case"), [(BF16, "image"), (BF16, "text"), (FP32, "batch")])
def test_an_interpreted_bundle_computes_what_torch_does(checkpoint, case):
    model = InterpretedModel.from_bundle(bundles.bundle(checkpoint))
    check_case(model, load_case(checkpoint, case), taps=bundles.SIZES[checkpoint].get("taps", False))


def test_its_cache_is_right_after_32_steps():
    check_cache(InterpretedModel.from_bundle(bundles.bundle(BF16)), load_case(BF16, "text"))


@pytest.mark.parametrize("checkpoint", [BF16, FP32])
def test_every_graph_of_a_bundle_gives_what_mindspore_gives(checkpoint):
    directory = bundles.bundle(checkpoint)
    model = MindIRModel.from_bundle(directory)
    bundle, graphs = model.bundle, model.engine.graphs
    rng = np.random.default_rng(3)
    for name, record in bundle.graphs.items():
        inputs = {}
        for port in record.inputs:
            inputs[port.name] = rng.standard_normal(port.shape).astype(np.float32)
            if port.dtype == "int32":
                top = {"valid": 64, "start": 60, "embeds_mask": 2, "last": record.tokens}.get(port.name, 50)
                inputs[port.name] = rng.integers(1, top, port.shape).astype(np.int32)
        text = model.engine.config.text
        rows = [
            [RowCache(text.num_hidden_layers, record.context, text.latent_dim) for _ in range(bundle.batch)]
            if record.context
            else []
            for _ in range(2)
        ]
        for mine, theirs in zip(*rows):
            for a, b in zip(mine.buffers, theirs.buffers):
                a[:] = b[:] = rng.standard_normal(a.shape)
            start = inputs["start"][0]
            inputs["start"][:] = start
            mine.length = theirs.length = int(start)
        got = InterpretedGraph(directory, name, bundle, model.weights, "lifted").run(inputs, rows[0])
        kind, size = record.kind, record.context or record.patches
        want = graphs._graph(kind, size, record.taps, record.tokens).run(inputs, rows[1])
        for g, w in zip(got, want, strict=True):
            assert g.dtype == w.dtype and rel_l2(g, w) <= 1e-5, name
        for mine, theirs in zip(*rows):
            for a, b in zip(mine.buffers, theirs.buffers):
                assert rel_l2(a, b) <= 1e-5, name


def test_a_graph_says_what_it_takes_and_is_made_of():
    graph = load_graph(bundles.bundle(BF16) / "decode-128.mindir", ["logits"])
    assert str(graph.inputs["input_ids"]) == "int32 [1, 1]"
    assert {k: str(v) for k, v in graph.outputs.items()} == {"logits": "float32 [1, 1, 1000]"}
    assert str(graph.parameters["cache.0.0"]) == "float32 [128, 40]"
    assert {"kimi_linear", "kimi_router", "ScatterUpdate"} <= graph.operators
    with pytest.raises(InterpreterError, match="has 1 outputs, expected 2: a, b"):
        load_graph(bundles.bundle(BF16) / "decode-128.mindir", ["a", "b"])


def test_a_wrong_weight_is_seen():
    model = InterpretedModel.from_bundle(bundles.bundle(BF16))
    array, changed = model.weights.array, "language_model.model.layers.1.mlp.experts.down_proj"
    assert changed in model.weights
    model.weights.array = lambda name: array(name)[::-1] if name == changed else array(name)
    case = load_case(BF16, "text")
    out = model(input_ids=case["input_ids"], attention_mask=case["attention_mask"])
    assert rel_l2(out.logits.asnumpy(), case["logits"]) > 1e-2


# Small graphs --------------------------------------------------------------------------------------------------------

X = np.array([1, 2, 3], np.float32)


class Branch(nn.Cell):
    def __init__(self):
        super().__init__()
        self.w = empty_parameter((3,), ms.float32, "w")

    def construct(self, x, n):
        if n > 2:
            y = x * self.w
        else:
            y = x - self.w
        return y + x


@pytest.mark.parametrize("n", [2, 3])
def test_a_branch_that_depends_on_data_is_a_call_of_a_sub_graph(n):
    count = np.array(n, np.int32)
    graph = read_graph(trace(Branch(), X, count, static=False))
    assert graph.functions and {"Switch", "Partial"} & graph.operators
    w = np.array([4, 5, 6], np.float32)
    (got,) = run(Interpreter(graph, {"w": w}), X, count)
    assert np.array_equal(got, (X * w if n > 2 else X - w) + X)


class Add(nn.Cell):
    def __init__(self):
        super().__init__()
        self.w = empty_parameter((3,), ms.float32, "w")

    def construct(self, x):
        return x + self.w


def test_an_operator_without_a_rule_is_named_with_its_node_and_inputs():
    with pytest.raises(InterpreterError, match=r"no rule for Acosh \(graph:0\) of float32 \[3\]"):
        interpreter(Apply(ms.ops.Acosh()), X)


def exported(cell: nn.Cell, x: np.ndarray, path) -> Graph:
    """The graph of a file that MindSpore's own export wrote."""
    ms.export(cell, ms.Tensor(x), file_name=str(path), file_format="MINDIR")
    return load_graph(path.with_suffix(".mindir"))


def test_a_file_that_is_not_ours_runs(tmp_path):
    net = nn.SequentialCell(nn.Dense(4, 8), nn.LayerNorm([8]), nn.GELU(), nn.Dense(8, 3, has_bias=False))
    x = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    parameters = {name: p.asnumpy() for name, p in net.parameters_dict().items()}
    (got,) = run(Interpreter(exported(net, x, tmp_path / "net"), parameters), x)
    np.testing.assert_allclose(got, net(ms.Tensor(x)).asnumpy(), rtol=1e-5, atol=1e-6)


def test_of_a_file_that_is_not_ours_an_operator_without_a_rule_is_named(tmp_path):
    net = nn.SequentialCell(nn.Conv2d(3, 2, 3), nn.ReLU())
    graph = exported(net, np.zeros((1, 3, 6, 6), np.float32), tmp_path / "net")
    parameters = {name: p.asnumpy() for name, p in net.parameters_dict().items()}
    with pytest.raises(
        InterpreterError, match=r"no rule for Conv2D .* float32 \[1, 3, 6, 6\], float32 \[2, 3, 3, 3\]"
    ):
        Interpreter(graph, parameters)


def test_a_parameter_that_was_not_given_or_is_another_is_an_error():
    with pytest.raises(InterpreterError, match=r"w: the graph takes float32 \[3\], but no such array"):
        interpreter(Add(), X)
    for wrong in (np.zeros(4, np.float32), np.zeros(3, np.int32)):
        made = interpreter(Add(), X, parameters={"w": wrong})
        with pytest.raises(InterpreterError, match=r"w: the graph takes float32 \[3\], but the array is"):
            run(made, X)


def test_a_shorter_float_stands_for_fp32_exactly():
    w = np.array([0.1, 0.2, 0.3]).astype(np.float16)
    assert np.array_equal(run(interpreter(Add(), X, parameters={"w": w}), X)[0], X + w.astype(np.float32))


def test_inputs_are_checked():
    made = interpreter(Add(), X, parameters={"w": X})
    with pytest.raises(InterpreterError, match=r"x: the graph takes float32 \[3\], but no such input"):
        made({})
    with pytest.raises(
        InterpreterError, match=r"x: the graph takes float32 \[3\], but the input is float32 \[2\]"
    ):
        made({"x": X[:2]})
    with pytest.raises(InterpreterError, match="but the input is int32"):
        made({"x": X.astype(np.int32)})


@pytest.mark.parametrize("change", ["dims", "dtype"])
def test_a_node_that_declares_another_type_than_it_has_is_an_error(change):
    model = trace(Add(), X)
    (node,) = (n for n in model.graph.node if mindir.REFERENCE + "Add" in n.op_type)
    (declared,) = (a.tensors[0] for a in node.attribute if a.name == "shape")
    if change == "dims":
        declared.dims[0] = 4
    else:
        declared.data_type = 10
    made = Interpreter(read_graph(model), {"w": X})
    with pytest.raises(
        InterpreterError, match=r"Add \(graph:\d+\) gives float32 \[3\], but the graph declares float"
    ):
        run(made, X)


def test_a_changed_attribute_changes_the_result():
    x = np.arange(6, dtype=np.float32).reshape(2, 3)
    model = trace(Apply(ms.ops.MatMul(transpose_b=True)), x, x)
    flags = [n for n in model.graph.node if n.op_type == "Constant" and n.attribute[0].type == 9]
    (transposed,) = (n.attribute[0] for n in flags if n.attribute[0].i or list(n.attribute[0].ints) == [1])
    transposed.i = 0
    del transposed.ints[:]
    with pytest.raises(InterpreterError, match="MatMul .* fails"):
        run(Interpreter(read_graph(model), {}), x, x)


def test_large_parameters_are_not_held():
    """The arrays are asked for each time, and what is made of one is dropped."""
    asked = []

    class Arrays(dict):
        def __getitem__(self, name):
            asked.append(name)
            return X

    made = interpreter(Add(), X, parameters=Arrays(w=X))
    run(made, X)
    run(made, X)
    assert asked == ["w", "w"]
