"""``inspect-mindir``: what it says of a graph follows from the graph, and agrees with the configuration."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path

import bundles
import mindspore as ms
import numpy as np
import pytest
import sparse
from click.testing import CliRunner
from golden import DATA
from mindspore import nn, ops
from traced import trace

from kimi_vl.export import mindir, plan_export
from kimi_vl.export.bundle import Bundle
from kimi_vl.export.flops import FEW_ROWS
from kimi_vl.export.inspect import cli
from kimi_vl.export.nodes import read_nodes
from kimi_vl.export.plan import GraphPlan, open_converted
from kimi_vl.export.summary import Summary
from kimi_vl.export.trace import Tracer
from kimi_vl.modeling.configuration import ModelConfig
from kimi_vl.modeling.kernels import library

BF16 = "tiny8-bf16"
needs_ascend = pytest.mark.skipif(not hasattr(ms, "DeviceCtx"), reason="Ascend graphs need MindSpore 2.10")


def run(*args: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(cli, [str(a) for a in args])
    return result.exit_code, result.stdout, result.stderr


# FLOPs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def summaries(tmp_path_factory) -> dict[str, tuple[ModelConfig, GraphPlan, Summary]]:
    """One graph of each kind, for Ascend, two layers of the published dimensions."""
    raw = json.loads((DATA / "published/config.json").read_text())
    raw["text_config"]["num_hidden_layers"] = raw["vision_config"]["num_hidden_layers"] = 2
    weights = open_converted(sparse.converted(tmp_path_factory.mktemp("inspect") / "wide", raw))
    plan = plan_export(weights, seq=(1024,), prefill_chunk=256, image_patches=(1024,))
    tracer = Tracer(plan.config, plan.target, 1)
    largest = {g.kind: g for g in plan.graphs}
    return {
        kind: (plan.config, graph, Summary(read_nodes(tracer.trace(graph))))
        for kind, graph in largest.items()
    }


def text_flops(config: ModelConfig, tokens: int, context: int, logits: int) -> int:
    """By hand: multiplications and additions of the matrices of the published architecture."""
    c = config.text
    h, heads, lora = c.hidden_size, c.num_attention_heads, c.kv_lora_rank
    nope, rope, v = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
    attention = tokens * (h * heads * (nope + rope) + h * (lora + rope) + heads * v * h)
    if tokens == 1:  # in latent space
        attention += heads * lora * (nope + v) + heads * context * (lora + rope + lora)
    else:  # keys and values of the window first
        attention += context * lora * heads * (nope + v) + tokens * context * heads * (nope + rope + v)
    dense = 3 * h * c.intermediate_size
    experts = h * c.n_routed_experts + 3 * h * (
        c.num_experts_per_tok * c.moe_intermediate_size + c.shared_intermediate_size
    )
    layers = sum(attention + tokens * (experts if c.is_moe(i) else dense) for i in range(c.num_hidden_layers))
    return 2 * (layers + logits * h * c.vocab_size)


def vision_flops(config: ModelConfig, patches: int) -> int:
    c, h = config.vision, config.text.hidden_size
    d = c.hidden_size
    block = patches * (4 * d * d + 2 * d * c.intermediate_size) + 2 * patches * patches * d
    projector = patches // 4 * (c.merged_dim * c.merged_dim + c.merged_dim * h)
    return 2 * (patches * c.patch_dim * d + c.num_hidden_layers * block + projector)


@needs_ascend
@pytest.mark.parametrize("kind", ["decode", "prefill", "prefill-logits", "vision"])
def test_flops_are_those_of_the_architecture(summaries, kind):
    config, graph, summary = summaries[kind]
    if graph.patches:
        expected = vision_flops(config, graph.patches)
    else:
        logits = graph.tokens if graph.all_logits else 1
        expected = text_flops(config, graph.tokens, graph.context, logits)
    assert sum(summary.flops.values()) == pytest.approx(expected, rel=0.02)
    assert summary.unknown == []


class Foreign(nn.Cell):
    """An operator that no graph here has, beside one that is known."""

    def __init__(self) -> None:
        super().__init__()
        self.matmul = ops.MatMul()

    def construct(self, x):
        return ops.tan(self.matmul(x, x))


def test_a_foreign_operator_is_named_and_the_others_are_counted(tmp_path):
    model = trace(Foreign(), np.zeros((8, 8), np.float32))
    (tmp_path / "any.mindir").write_bytes(mindir.serialise(model))
    status, out, _ = run(tmp_path / "any.mindir", "--json")
    shown = json.loads(out)["any"]
    assert status == 0 and shown["flops"] == 2 * 8**3
    (foreign,) = shown["unknown_operators"]
    assert foreign.lower().startswith("tan")
    assert f"unknown    {foreign}; counted as no FLOPs" in run(tmp_path / "any.mindir")[1]


# What is shown -------------------------------------------------------------------------------------------------------


def test_a_bundle_is_shown_graph_by_graph():
    directory = bundles.bundle(BF16)
    status, out, err = run(directory)
    assert status == 0 and err == ""
    assert "bundle     for cpu, bfloat16, batch 1" in out
    shown = json.loads(run(directory, "--json")[1])
    manifest = Bundle.load(directory)
    assert set(shown) == set(manifest.graphs)
    for name, graph in manifest.graphs.items():
        assert re.search(rf"^{name}  .* kB$", out, re.M)
        summary = shown[name]
        assert list(summary["inputs"]) == [port.name for port in graph.inputs]
        assert summary["outputs"] == [f"{p.dtype} {list(p.shape)}" for p in graph.outputs]
        assert summary["live_bytes"] == graph.live_bytes
        assert summary["cache_bytes"] == sum(4 * np.prod(port.shape) for port in graph.caches)
        assert summary["unknown_operators"] == [] and summary["sub_graphs"] == 0
        assert sum(summary["launches"].values()) == sum(summary["operators"].values())


def test_weights_are_counted_where_they_are_used():
    directory = bundles.bundle(BF16)
    shown = json.loads(run(directory, "--json")[1])
    weights = Bundle.load(directory).weights
    text = sum(w.nbytes for name, w in weights.items() if name.startswith("language_model"))
    rest = sum(w.nbytes for name, w in weights.items() if not name.startswith("language_model"))
    assert shown["decode-256"]["weight_bytes"] == text and shown["vision-64"]["weight_bytes"] == rest


def test_of_the_cpus_operators_flops_are_those_of_the_architecture():
    config = ModelConfig.from_file(bundles.converted(BF16))
    directory = bundles.bundle(BF16)
    for name, graph in Bundle.load(directory).graphs.items():
        summary = Summary.of_file(directory / graph.file)
        if graph.patches:
            expected = vision_flops(config, graph.patches)
        else:
            tokens = graph.tokens
            expected = text_flops(config, tokens, graph.context, tokens if graph.kind != "prefill" else 1)
        assert sum(summary.flops.values()) == pytest.approx(expected, rel=1e-3), name


def test_few_tokens_are_as_many_as_the_library_takes_into_the_latent_space():
    source = (Path(library.__file__).parent / "native" / "products.h").read_text()
    assert f"kFewRows = {FEW_ROWS};" in source


@needs_ascend
def test_operators_are_counted_by_layer(summaries):
    _, _, decode = summaries["decode"]
    assert list(decode.launches) == ["before", "layer 0", "layer 1", "after"]
    assert decode.launches["after"] == 2  # norm and head
    places = decode.nodes.places
    for operator, layers in (("GroupedMatmulV4", {1}), ("KVCacheScatterUpdate", {0, 1}), ("Gather", {-1})):
        assert {places[n.output] for n in decode.nodes.nodes if n.operator == operator} == layers


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("nowhere",), "nowhere: is neither a bundle nor a MindIR file"),
        ((__file__,), "test_inspect.py: is no MindIR"),
        (("BUNDLE", "--graph", "decode-9"), "has no decode-9; choose one of vision-64"),
        (("BUNDLE", "--svg", "x.svg"), "--svg: draws one graph; choose with --graph: vision-64"),
        (("BUNDLE", "--graph", "decode-256", "--svg", "x.svg", "--layer", "9"), "--layer: 9, but the graph has layers 0 to"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_status_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, err = run(*(bundles.bundle(BF16) if a == "BUNDLE" else a for a in arguments))
    assert status == 2 and message in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


# Pictures ------------------------------------------------------------------------------------------------------------


def drawn(tmp_path: Path, graph: str, layer: int) -> list[str]:
    """The texts of a picture."""
    file = tmp_path / "layer.svg"
    status, out, err = run(bundles.bundle(BF16), "--graph", graph, "--svg", file, "--layer", layer)
    assert status == 0 and str(file) in out, err
    return [e.text or "" for e in ET.parse(file).getroot().iter("{http://www.w3.org/2000/svg}text")]


@pytest.mark.parametrize("graph", ["decode-256", "prefill-64x256", "vision-64"])
def test_a_picture_has_every_operator_and_parameter_of_its_layer(graph, tmp_path):
    texts = drawn(tmp_path, graph, 1)
    nodes = read_nodes(mindir.read(bundles.bundle(BF16) / f"{graph}.mindir"))
    inside = Counter(n.operator for n in nodes.nodes if nodes.places[n.output] == 1 and not n.free)
    assert not inside - Counter(texts)
    names = {t.split()[1] for t in texts if t.startswith("▪")}
    parameters = map(mindir.plain, nodes.parameters)
    assert names == {
        p.partition(".1.")[2] if "s.1." in p else p
        for p in parameters
        if re.search(r"(layers|blocks)\.1\.|^cache\.1\.", p)
    }
    assert texts[0] == f"{graph}, layer 1" and any(re.fullmatch(r"fp32 \d+(×\d+)+", t) for t in texts)


def test_whoever_stops_reading_hears_nothing():
    command = [sys.executable, "-m", "kimi_vl.export.inspect", str(bundles.bundle(BF16))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
