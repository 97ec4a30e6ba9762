"""Graphs for Ascend: traced on this host and run nowhere; what can be known about them without a device."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import bundles
import mindspore as ms
import numpy as np
import pytest
import sparse
from checkpoints import configuration, tensors, write_checkpoint
from click.testing import CliRunner
from golden import DATA
from mindspore import nn
from mindspore.ops import auto_generate as generated
from traced import run, trace

import kimi_vl
from kimi_vl.convert import EnvironmentProblem, convert
from kimi_vl.export import (
    BundleError,
    ExportError,
    MindIRModel,
    export,
    legality,
    lint,
    mindir,
    plan_export,
    releases,
)
from kimi_vl.export.bundle import Bundle, GraphRecord
from kimi_vl.export.cli import cli
from kimi_vl.export.operators import GE, KBK, ROWS
from kimi_vl.export.plan import CACHE_WRITES, FLAT_WRITES, BundlePlan, open_converted
from kimi_vl.export.proto import pb
from kimi_vl.export.trace import Tracer
from kimi_vl.modeling.kernels import get_kernels, lite
from kimi_vl.modeling.modeling_kimi_vl import _has_data
from kimi_vl.verify.mindir import Interpreter, read_graph

SMALL = {"seq": (128,), "prefill_chunk": 32, "image_patches": (64,), "target": "ascend"}
# Two layers, one dense and one with experts, and one block of the vision tower, all of the published dimensions.
WIDE = {"seq": (256,), "prefill_chunk": 256, "image_patches": (1024,), "target": "ascend"}
# Fused operators that CANN documents for Atlas A2 and A3 only, or not in full for the inference series.
NOT_ON_310P = {
    "FusedInferAttentionScore",
    "GroupedMatmul",
    "GroupedMatmulV4",
    "InnerMoeTokenUnpermute",
    "InplaceIndexCopy",
    "KVCacheScatterUpdate",
    "MoeInitRoutingV2",
}
LAUNCHES = 42  # operators that a layer with experts starts per token, at a batch of one


class Products(nn.Cell):
    def construct(self, x, i):
        return 0.1 * x + 0.1, i * 7, x * -1e30


def real_dimensions(layers: int) -> dict:
    raw = json.loads((DATA / "published/config.json").read_text())
    raw["text_config"]["num_hidden_layers"] = layers
    raw["vision_config"]["num_hidden_layers"] = 1
    return raw


@pytest.fixture(scope="module")
def room(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("ascend")


@pytest.fixture(scope="module")
def plans(room) -> dict[str, BundlePlan]:
    """A small plan of each checkpoint."""
    convert(kimi_vl.nano_path(), room / "nano", dtype="bf16")
    sparse.converted(room / "wide", real_dimensions(2))
    return {
        "nano": plan_export(open_converted(room / "nano"), **SMALL),
        "tiny8-bf16": plan_export(open_converted(bundles.converted("tiny8-bf16")), **SMALL, taps=True),
        "wide": plan_export(open_converted(room / "wide"), **WIDE),
    }


@pytest.fixture(scope="module")
def written(room, plans) -> dict[str, Path]:
    """Their bundles."""
    for name, plan in plans.items():
        export(plan, room / f"mindir-{name}")
    return {name: room / f"mindir-{name}" for name in plans}


CHECKPOINTS = ("nano", "tiny8-bf16", "wide")


def graphs(directory: Path) -> dict[str, pb.ModelProto]:
    return {n: mindir.read(directory / g.file) for n, g in Bundle.load(directory).graphs.items()}


def check(name: str, model: pb.ModelProto, record: GraphRecord) -> None:
    """As an export does."""
    inputs = {p.name: (p.shape, p.dtype) for p in record.inputs}
    lint.check(name, model, [p.name for p in record.caches], inputs)
    legality.check(name, model, KBK, ("a2", "a3"))


def operators(model: pb.ModelProto) -> Counter[str]:
    return lint.launches(model)


def head_dims(model: pb.ModelProto) -> set[int]:
    """Of all fused attention in a graph."""
    seen = lint.Lint("graph", model, (), {})
    return {
        tensor.dims[-1]
        for node in seen.nodes
        if lint.operator(node) == "FusedInferAttentionScore"
        for value in node.input[:3]
        for tensor in seen.tensors(value)
    }


# What is written -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_inputs_outputs_and_caches_are_those_of_the_manifest(written, name):
    for graph, model in graphs(written[name]).items():
        record = Bundle.load(written[name]).graphs[graph]
        assert [(p.name, (p.shape, p.dtype)) for p in record.inputs] == list(mindir.inputs(model).items())
        assert [(p.shape, p.dtype) for p in record.outputs] == mindir.outputs(model)
        held = mindir.parameters(model)
        assert {p.name: (p.shape, p.dtype) for p in record.caches}.items() <= held.items()
        assert {dtype for _, dtype in held.values()} <= {"bfloat16", "float32"}


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_weights_are_mapped_as_they_are_stored(written, plans, name):
    manifest = Bundle.load(written[name])
    assert manifest.parameter_dtype is None and manifest.dtype == "bfloat16"
    for graph, model in graphs(written[name]).items():
        weights = set(mindir.parameters(model)) - {p.name for p in manifest.graphs[graph].caches}
        assert set(mindir.pointing(model)) == weights and manifest.graphs[graph].external_data
        for weight in weights:
            record = manifest.weights[weight]
            assert mindir.parameters(model)[weight] == (record.shape, record.dtype)
            assert record.dtype == ("float32" if ".gate." in weight else "bfloat16")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_every_graph_passes_the_checks_and_no_head_dim_is_one_that_a_kernel_refuses(written, name):
    manifest = Bundle.load(written[name])
    for graph, model in graphs(written[name]).items():
        check(graph, model, manifest.graphs[graph])
        fused = operators(model)["FusedInferAttentionScore"]
        assert (fused == 0) == graph.startswith("decode") and all(d % 16 == 0 for d in head_dims(model))
    wide = graphs(written["wide"])
    assert head_dims(wide["prefill-256x256"]) == {192} and head_dims(wide["vision-1024"]) == {80}


def test_decoding_starts_few_operators_per_layer(room, plans):
    counts = []
    for layers in (2, 3):
        sparse.converted(room / f"layers-{layers}", real_dimensions(layers))
        plan = plan_export(open_converted(room / f"layers-{layers}"), **WIDE)
        (decode,) = (g for g in plan.graphs if g.name == "decode-256")
        counts.append(operators(Tracer(plan.config, plan.target, 1).trace(decode)))
    assert sum((counts[1] - counts[0]).values()) <= LAUNCHES
    assert counts[0]["Transpose"] == counts[0]["StridedSlice"] == counts[0]["TensorMove"] == 0


def test_tracing_holds_no_weight_and_needs_no_ascend_library(plans):
    plan = plans["wide"]
    tracer = Tracer(plan.config, plan.target, plan.batch)
    for graph in (plan.graphs[0], plan.graphs[-1]):
        tracer.trace(graph)
    for cell in (tracer.vision_tower, tracer.projector, tracer.language_model):
        assert not any(_has_data(p) for p in cell.get_parameters())
    loaded = {Path(line.split()[-1]).name for line in Path("/proc/self/maps").read_text().splitlines()}
    assert any("mindspore_core" in name for name in loaded)
    assert not any("ascend" in name or "acl" in name.split(".")[0].split("_") for name in loaded)


@pytest.mark.parametrize("graph", ["prefill-32x128", "decode-128", "vision-64"])
def test_mindspore_reads_the_graphs_back(written, graph):
    record = Bundle.load(written["tiny8-bf16"]).graphs[graph]
    cell = nn.GraphCell(ms.load(str(written["tiny8-bf16"] / record.file)))
    held = {n: (tuple(p.shape), str(p.dtype).lower()) for n, p in cell.parameters_dict().items()}
    assert held == mindir.parameters(mindir.read(written["tiny8-bf16"] / record.file))


@pytest.mark.slow
def test_the_whole_model_is_exported_in_little_memory(room, tmp_path):
    raw = json.loads((DATA / "published/config.json").read_text())
    sparse.converted(room / "whole", raw)
    arguments = ("--seq", "256", "--image-patches", "1024", "--target", "ascend")
    code = (
        "from kimi_vl.export.cli import cli; cli(standalone_mode=False)\n"
        "print([line for line in open('/proc/self/status') if line.startswith('VmHWM')][0].split()[1])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "--src", room / "whole", "--dst", tmp_path / "mindir", *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 1_000_000  # kB; the weights are 33 GB
    manifest = Bundle.load(tmp_path / "mindir")
    assert sum(record.nbytes for record in manifest.weights.values()) > 32e9
    assert sum(graph.nbytes for graph in manifest.graphs.values()) < 4e6


def test_two_processes_write_the_same_bytes(written, tmp_path):
    arguments = ("--seq", "128", "--prefill-chunk", "32", "--image-patches", "64", "--target", "ascend")
    src = Path(written["nano"]).parent / "nano"
    code = "from kimi_vl.export.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "--src", src, "--dst", tmp_path / "again", *arguments],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "launches   decode-128 " in done.stdout
    names = sorted(p.name for p in written["nano"].iterdir())
    assert names == sorted(p.name for p in (tmp_path / "again").iterdir()) and "decode-128.mindir" in names
    for name in names:
        assert (written["nano"] / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


@pytest.mark.parametrize(
    "target, attention, experts",
    [("ascend", "plain", "fused"), ("ascend", "fused", "plain"), ("lite", "plain", "plain")],
)
def test_attention_and_experts_can_be_made_of_plain_operators(plans, tmp_path, target, attention, experts):
    asked = SMALL | {"target": target, "attention": attention, "experts": experts}
    export(plan_export(plans["tiny8-bf16"].weights, **asked, batch=2), tmp_path / "mindir")
    manifest = Bundle.load(tmp_path / "mindir")
    assert (manifest.target, manifest.attention, manifest.experts) == (target, attention, experts)
    made = graphs(tmp_path / "mindir")
    for graph in ("prefill-32x128", "vision-64"):
        assert (operators(made[graph])["FusedInferAttentionScore"] == 0) == (attention == "plain")
    for graph in ("prefill-32x128", "decode-128"):
        grouped = {"ascend": "GroupedMatmulV4", "lite": "GroupedMatmul"}[target]
        assert (operators(made[graph])[grouped] == 0) == (experts == "plain")


INDEX_COPY = pytest.param(
    "index-copy",
    marks=pytest.mark.skipif(not hasattr(generated, "InplaceIndexCopy"), reason="not in this MindSpore"),
)


@pytest.mark.parametrize("cache_write", [*CACHE_WRITES[:3], INDEX_COPY])
def test_each_way_to_write_the_cache_uses_its_operator_once_a_layer(plans, cache_write):
    plan = plan_export(plans["tiny8-bf16"].weights, **SMALL, batch=2, cache_write=cache_write)
    text, (graph,) = plan.config.text, (g for g in plan.graphs if g.name == "prefill-32x128")
    shape = (2 * 128, text.latent_dim) if cache_write in FLAT_WRITES else (2, 1, 128, text.latent_dim)
    assert graph.caches["cache.0.0"] == (shape, "bfloat16")
    model = Tracer(plan.config, plan.target, 2).trace(graph)
    lint.check(graph.name, model, graph.caches, graph.inputs)
    legality.check(graph.name, model, KBK, plan.target.products)
    written = {n: count for n, count in operators(model).items() if n in lint.WRITES}
    assert written == {lint.WRITES[CACHE_WRITES.index(cache_write)]: text.num_hidden_layers}
    assert plan.to_dict()["cache_write"] == cache_write


@pytest.mark.parametrize("target", ["ascend", "lite"])
def test_fp16_and_plain_operators_leave_out_what_an_atlas_300i_duo_lacks(tmp_path, target):
    convert(DATA / "tiny8-bf16", tmp_path / "ckpt", dtype="fp16", allow_overflow=True)
    plain = {"attention": "plain", "experts": "plain", "cache_write": "scatter-nd"}
    plan = plan_export(open_converted(tmp_path / "ckpt"), **SMALL | {"target": target, **plain})
    tracer = Tracer(plan.config, plan.target, plan.batch)
    made = {g.kind: tracer.trace(g) for g in plan.graphs if g.all_logits}
    assert made.keys() == {"vision", "prefill-logits", "decode"}
    for model in made.values():
        assert not operators(model).keys() & NOT_ON_310P
        assert {dtype for _, dtype in mindir.parameters(model).values()} <= {"float16", "float32"}


def test_rows_of_a_batch_share_one_cache_parameter(plans):
    plan = plan_export(plans["tiny8-bf16"].weights, **SMALL, batch=3)
    decode = next(g for g in plan.graphs if g.name == "decode-128")
    text = plan.config.text
    assert decode.caches["cache.0.0"] == ((3, 1, 128, text.latent_dim), "bfloat16")
    assert len(decode.caches) == text.num_hidden_layers


def test_fp16_weights_give_fp16_graphs(tmp_path):
    convert(DATA / "tiny8-bf16", tmp_path / "ckpt", dtype="fp16", allow_overflow=True)
    plan = plan_export(open_converted(tmp_path / "ckpt"), **SMALL)
    assert plan.dtype == plan.target.dtype == "float16"
    export(plan, tmp_path / "mindir")
    model = mindir.read(tmp_path / "mindir/decode-128.mindir")
    assert mindir.outputs(model)[0][1] == "float16" and mindir.inputs(model)["cos"][1] == "float16"


def test_for_the_graph_engine_a_number_becomes_a_tensor():
    x = np.array([[1.5, -2, 0.25]], np.float32)
    i = np.array([[3, -4]], np.int32)
    model = trace(Products(), x, i, static=False)
    assert operators(model)["Muls"] == (
        3 if hasattr(ms, "DeviceCtx") else 2
    )  # 2.7 multiplies one of them itself
    mindir.numbers_as_tensors(model)
    mindir.normalise(model)
    assert operators(model) == {"Mul": 3, "Add": 1}
    got = run(Interpreter(read_graph(model), {}), x, i)
    assert np.array_equal(got[0], x * np.float32(0.1) + np.float32(0.1)) and np.array_equal(got[1], i * 7)
    with pytest.raises(ExportError, match="multiplies a number and a tensor that would round it"):
        mindir.numbers_as_tensors(trace(Products(), x.astype(np.float16), i, static=False))


def test_head_dims_of_any_size_are_padded(tmp_path):
    config = configuration()
    src = write_checkpoint(tmp_path / "src", config, tensors(config))
    convert(src, tmp_path / "ckpt")
    plan = plan_export(
        open_converted(tmp_path / "ckpt"), seq=(64,), prefill_chunk=16, image_patches=(16,), target="ascend"
    )
    export(plan, tmp_path / "mindir")
    made = graphs(tmp_path / "mindir")
    assert head_dims(made["prefill-16x64"]) == {16} and head_dims(made["vision-16"]) == {
        16
    }  # of 13 and 5, and 12


# What is refused -----------------------------------------------------------------------------------------------------


def test_fp32_is_refused(plans):
    with pytest.raises(ExportError, match="holds float32, but target ascend computes in bf16 or fp16"):
        plan_export(open_converted(bundles.converted("tiny8-fp32")), **SMALL)
    with pytest.raises(ExportError, match="--dtype: fp32, but .* holds bfloat16"):
        plan_export(plans["tiny8-bf16"].weights, **SMALL, dtype="fp32")


def test_variants_are_for_targets_that_have_them(plans):
    with pytest.raises(ExportError, match="--experts: plain, but target cpu has plain operators only"):
        plan_export(plans["tiny8-bf16"].weights, target="cpu", experts="plain")
    for name, variants in (("plain", {"attention": "fused"}), ("ascend", {"experts": "slow"})):
        with pytest.raises(ValueError, match=f"kernels: {name} has no"):
            get_kernels(name, **variants)


def test_index_copy_is_not_for_lite(plans):
    with pytest.raises(
        ExportError, match="--cache-write: index-copy, but target lite has scatter, scatter-nd"
    ):
        plan_export(plans["tiny8-bf16"].weights, target="lite", cache_write="index-copy")
    with pytest.raises(ValueError, match="kernels: lite has no cache_write called 'index-copy'"):
        get_kernels("lite", cache_write="index-copy")


def test_an_operator_without_a_graph_engine_adapter_is_refused(written):
    model = mindir.read(written["tiny8-bf16"] / "decode-128.mindir")
    legality.check("decode-128", model, KBK, ("a2", "a3"))
    with pytest.raises(ExportError, match="decode-128: node .* is listed for no product in a graph engine"):
        legality.check("decode-128", model, GE, ("a2", "a3"))


def test_more_rows_than_fp32_can_number_are_refused(plans, monkeypatch):
    plan = plan_export(plans["tiny8-bf16"].weights, **SMALL | {"target": "lite"})
    (decode,) = (g for g in plan.graphs if g.name == "decode-128")
    monkeypatch.setattr(lite, "EXACT", 1)
    with pytest.raises(ValueError, match="more rows than fp32 can number; use a smaller prefill chunk"):
        Tracer(plan.config, plan.target, 1).trace(decode)


def test_a_mindspore_without_index_copy_is_named(plans, monkeypatch):
    plan = plan_export(plans["tiny8-bf16"].weights, **SMALL, cache_write="index-copy")
    monkeypatch.delattr(generated, "InplaceIndexCopy", raising=False)
    with pytest.raises(EnvironmentProblem, match="has no InplaceIndexCopy for --cache-write index-copy"):
        Tracer(plan.config, plan.target, 1)


def test_the_wheel_has_every_adapter_that_lite_counts_on():
    library = Path(ms.__file__).parent / "lib/plugin/ascend/libmindspore_ascend_res_manager.so"
    if not library.is_file():
        pytest.skip("this MindSpore has no Ascend library")
    found = re.findall(rb"ascend9OpAdapterI(?:N2ge2op|NS1_)\d+(?:cz)?(\w+?)E+\0", library.read_bytes())
    assert len(set(found)) > 700
    assert {row.kernels[GE].encode() for row in ROWS.values() if row.kernels[GE]} <= set(found)


def test_a_cpu_does_not_run_it(written):
    with pytest.raises(BundleError, match="is for ascend, .* export with --target cpu to run it here$"):
        MindIRModel.from_bundle(written["nano"])


def test_products_are_for_targets_that_are_devices(plans):
    weights = plans["tiny8-bf16"].weights
    with pytest.raises(ExportError, match="--product: a2, but target cpu runs on any machine; leave it out"):
        plan_export(weights, target="cpu", products=("a2",))
    with pytest.raises(ExportError, match="--product: 950, expected a2, a3, 310p"):
        plan_export(weights, **SMALL, products=("a2", "950"))


def test_the_command_shows_what_it_would_write(room, plans, untraced):
    result = CliRunner().invoke(
        cli, ["--src", str(room / "wide"), "--target", "ascend", "--attention", "plain", "--dry-run"]
    )
    assert result.exit_code == 0, result.output
    assert "computing in bfloat16" in result.output and "mapped as they are stored" in result.output
    assert "attention: plain" in result.output and "experts: default" in result.output
    result = CliRunner().invoke(
        cli, ["--src", str(bundles.converted("tiny8-fp32")), "--target", "ascend", "--dry-run"]
    )
    assert result.exit_code == 2 and "holds float32" in result.output


def test_the_command_refuses_a_product_and_says_what_to_choose(room, plans, tmp_path):
    arguments = [
        "--src",
        str(room / "wide"),
        "--dst",
        str(tmp_path / "mindir"),
        "--target",
        "ascend",
        "--seq",
        "128",
    ]
    arguments += ["--image-patches", "64"]
    result = CliRunner().invoke(cli, [*arguments, "--product", "a2, 310P"])
    assert result.exit_code == 2
    assert (
        "FusedInferAttentionScore is listed for a2, a3 only kernel by kernel (T attention/" in result.stderr
    )
    assert "export with --attention plain and convert the checkpoint with --dtype fp16" in result.stderr
    assert not (tmp_path / "mindir").exists()
    result = CliRunner().invoke(cli, [*arguments, "--product", "a4"])
    assert result.exit_code == 2 and "'a4' is no product; choose of a2, a3, 310p" in result.stderr


def test_a_bundle_says_for_which_products_and_releases_it_is(written, plans, tmp_path):
    assert Bundle.load(written["nano"]).products == ("a2", "a3")
    (release,) = {"2.7.0"} & {ms.__version__} or {"2.7.1"}  # which one's GroupedMatmulV4 this is
    assert Bundle.load(written["nano"]).releases.get(release) == releases.CANN[release]
    plan = plan_export(plans["tiny8-bf16"].weights, **SMALL, experts="plain", products=("a3",))
    manifest = export(plan, tmp_path / "mindir").bundle
    assert manifest.products == ("a3",) and manifest.releases == releases.CANN


@pytest.mark.parametrize(
    ("operands", "run"), [(16, {"2.7.0"}), (17, {"2.7.1", "2.7.2", "2.9.0"}), (18, set())]
)
def test_a_release_runs_graphs_whose_operators_have_its_operands(operands, run):
    model = pb.ModelProto()
    model.graph.node.add(op_type="REF::GroupedMatmulV4:3", input=["x"] * operands)
    assert releases.run_by(model) == run


# The lint ------------------------------------------------------------------------------------------------------------


def nodes(model: pb.ModelProto, operator: str) -> list:
    return [n for n in model.graph.node if lint.operator(n) == operator]


def insert(model: pb.ModelProto, operator: str, value: str) -> str:
    """A new node that takes `value`, at the start of the graph; what it gives."""
    node = pb.NodeProto(op_type=f"REF::{operator}:0", input=[value], output=[f"graph:{operator}"])
    rest = [pb.NodeProto.FromString(n.SerializeToString()) for n in model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend([node, *rest])
    return node.output[0]


def retype(model: pb.ModelProto, value: str, dtype: int) -> None:
    for tensor in lint.Lint("graph", model, (), {}).tensors(value):
        tensor.data_type = dtype


def read_cache(model):
    nodes(model, "Reshape")[0].input[0] = "graph:cache.0.0"


def copy_cache(model):
    copy = insert(model, "TensorMove", "graph:cache.0.0")
    nodes(model, "KVCacheScatterUpdate")[0].input[0] = copy


def forget_write(model):
    nodes(model, "KVCacheScatterUpdate")[0].input[0] = model.graph.node[0].output[0]


def change_weight(operator):
    def change(model):
        load = nodes(model, "Load")[0]
        insert(model, operator, load.output[0])

    return change


def large_constant(model):
    attribute = nodes(model, "Constant")[0].attribute.add()
    attribute.name = "value"
    attribute.tensors.add().raw_data = bytes((1 << 20) + 1)


def read_before_write(model):
    """The read waits for the write in time, but does not take what it gives."""
    write = nodes(model, "KVCacheScatterUpdate")[0].output[0]
    (read,) = (n for n in nodes(model, "Load") if n.input[0] == write)
    read.input[0] = "graph:cache.0.0"


def forget_read(model):
    """Every use of the written cache takes another value instead."""
    write = nodes(model, "KVCacheScatterUpdate")[0]
    (read,) = (n for n in nodes(model, "Load") if n.input[0] == write.output[0])
    for node in model.graph.node:
        if lint.operator(node) == "Reshape" and node.input[0] == read.output[0]:
            node.input[0] = write.input[2]


def count_in_int64(model):
    add = nodes(model, "Add")[0]
    retype(model, add.output[0], pb.TensorProto.INT64)


def take_int64(model):
    cast = next(n for n in nodes(model, "Cast") if lint.Lint("graph", model, (), {}).has_int64(n.output[0]))
    nodes(model, "Add")[0].input[0] = cast.output[0]


def swap_inputs(model):
    first, second = (pb.ValueInfoProto.FromString(i.SerializeToString()) for i in model.graph.input[:2])
    model.graph.input[0].CopyFrom(second)
    model.graph.input[1].CopyFrom(first)


def retype_input(model):
    model.graph.input[0].tensor[0].data_type = pb.TensorProto.FLOAT


def weights(model):
    return [p for p in model.graph.parameter if "cache" not in p.name]


def add_again(model):
    model.graph.parameter.add().CopyFrom(weights(model)[0])


def share_bytes(model):
    a, b = weights(model)[:2]
    b.external_data.CopyFrom(a.external_data)


def forget_bytes(model):
    weights(model)[0].ClearField("external_data")


def keep_bytes(model):
    weights(model)[0].raw_data = b"12"


def fill_cache(model):
    (cache, *_) = (p for p in model.graph.parameter if "cache" in p.name)
    cache.external_data.location = "model.safetensors"


FAULTS = {
    "a cache read without its write": (read_cache, "reads cache.0.0 without waiting for its write"),
    "a cache read beside its write": (read_before_write, r"\(Load\): reads cache.0.0 without waiting for its write"),
    "a write that nothing takes": (forget_read, "writes cache.0.0, but no output is computed from what it gives"),
    "a copied cache": (copy_cache, "copies cache.0.0, which must be written where it is"),
    "a cache that nothing writes": (forget_write, "is written 0 times"),
    "a transposed weight": (change_weight("Transpose"), r"\(Transpose\): changes the weight .*weight"),
    "a cast weight": (change_weight("Cast"), r"\(Cast\): changes the weight .*weight"),
    "a large constant": (large_constant, r"\(Constant\): is a constant of 10\d+ bytes"),
    "int64 arithmetic": (count_in_int64, r"\(Add\): computes in int64; compute in int32"),
    "int64 where it is not needed": (take_int64, r"\(Add\): takes int64, which it does not need"),
    "inputs in another order": (swap_inputs, "inputs: are {'embeds'.*expected {'input_ids'"),
    "an input of another dtype": (retype_input, "inputs: are {'input_ids'.*'float32'.*expected .*'int32'"),
    "a parameter that is there twice": (add_again, "is 2 parameters, expected one"),
    "two weights in one place": (share_bytes, "takes its bytes from where .* does"),
    "a weight without data": (forget_bytes, "has no data, while other parameters have"),
    "a weight in the graph": (keep_bytes, "has its data in the graph, expected in a shard"),
    "a cache with content": (fill_cache, "cache.0.0: is a cache, but takes its content from model.safetensors"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_lint_finds(fault, written):
    change, message = FAULTS[fault]
    record = Bundle.load(written["tiny8-bf16"]).graphs["prefill-32x128"]
    model = mindir.read(written["tiny8-bf16"] / record.file)
    change(model)
    with pytest.raises(ExportError, match=f"prefill-32x128: node .*{message}"):
        check("prefill-32x128", model, record)


def test_a_graph_that_breaks_a_rule_is_not_written(plans, tmp_path, monkeypatch):
    monkeypatch.setattr(lint, "LARGEST_CONSTANT", 1)
    with pytest.raises(ExportError, match="vision-64.*: node .*: is a constant of"):
        export(plans["tiny8-bf16"], tmp_path / "mindir")
    assert list(tmp_path.iterdir()) == []
