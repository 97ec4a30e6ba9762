"""Graphs for Ascend: traced on this host and run nowhere; what can be known about them without a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import bundles
import mindspore as ms
import pytest
import sparse
from checkpoints import configuration, tensors, write_checkpoint
from click.testing import CliRunner
from golden import DATA
from mindspore import nn
from mindspore.train import mind_ir_pb2 as pb

import kimi_vl
from kimi_vl.convert import EnvironmentProblem, convert
from kimi_vl.export import BundleError, ExportError, MindIRModel, export, lint, mindir, plan_export
from kimi_vl.export.bundle import Bundle
from kimi_vl.export.cli import cli
from kimi_vl.export.plan import BundlePlan, open_converted
from kimi_vl.export.trace import Tracer
from kimi_vl.modeling.kernels import get_kernels
from kimi_vl.modeling.modeling_kimi_vl import _has_data

pytestmark = pytest.mark.skipif(not hasattr(ms, "DeviceCtx"), reason="Ascend graphs need MindSpore 2.10")

SMALL = {"seq": (128,), "prefill_chunk": 32, "image_patches": (64,), "target": "ascend"}
# Two layers, one dense and one with experts, and one block of the vision tower, all of the published dimensions.
WIDE = {"seq": (256,), "prefill_chunk": 256, "image_patches": (1024,), "target": "ascend"}
LAUNCHES = 46  # operators that a layer with experts starts per token, at a batch of one


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


def operators(model: pb.ModelProto) -> Counter[str]:
    return lint.launches(model)


def head_dims(model: pb.ModelProto) -> set[int]:
    """Of all fused attention in a graph."""
    seen = lint.Lint("graph", model, ())
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
def test_every_graph_passes_the_lint_and_no_head_dim_is_one_that_a_kernel_refuses(written, name):
    manifest = Bundle.load(written[name])
    for graph, model in graphs(written[name]).items():
        lint.check(graph, model, [p.name for p in manifest.graphs[graph].caches])
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


@pytest.mark.parametrize("attention, experts", [("plain", "fused"), ("fused", "plain"), ("plain", "plain")])
def test_attention_and_experts_can_be_made_of_plain_operators(plans, tmp_path, attention, experts):
    plan = plan_export(plans["tiny8-bf16"].weights, **SMALL, batch=2, attention=attention, experts=experts)
    export(plan, tmp_path / "mindir")
    manifest = Bundle.load(tmp_path / "mindir")
    assert (manifest.target, manifest.attention, manifest.experts) == ("ascend", attention, experts)
    made = graphs(tmp_path / "mindir")
    for graph in ("prefill-32x128", "vision-64"):
        assert (operators(made[graph])["FusedInferAttentionScore"] == 0) == (attention == "plain")
    for graph in ("prefill-32x128", "decode-128"):
        assert (operators(made[graph])["GroupedMatmulV4"] == 0) == (experts == "plain")


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


def test_a_head_dim_that_the_fused_operator_does_not_take_is_refused():
    with pytest.raises(ValueError, match="a head dim of 520, .* takes at most 512; use plain attention"):
        get_kernels("ascend").FusedAttention(2, 520, 8, 1.0, 0)


def test_a_cpu_does_not_run_it(written):
    with pytest.raises(BundleError, match="is for ascend, .* export with --target cpu to run it here$"):
        MindIRModel.from_bundle(written["nano"])


def test_an_old_mindspore_is_refused(plans, tmp_path, monkeypatch):
    monkeypatch.setattr(ms, "__version__", "2.7.0")
    with pytest.raises(
        EnvironmentProblem, match="MindSpore 2.7.0: graphs for ascend are made of operators of 2.10"
    ):
        export(plans["nano"], tmp_path / "mindir")


def test_the_command_shows_what_it_would_write(room, plans):
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
    for tensor in lint.Lint("graph", model, ()).tensors(value):
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


def widen(model):
    retype(model, nodes(model, "MatMul")[0].output[0], pb.TensorProto.DOUBLE)


def foreign(model):
    insert(model, "PagedAttention", model.graph.node[0].output[0])


def head_dim(size, operands):
    def change(model):
        seen = lint.Lint("graph", model, ())
        for value in nodes(model, "FusedInferAttentionScore")[0].input[operands]:
            for tensor in seen.tensors(value):
                tensor.dims[-1] = size

    return change


def attention_dtype(model):
    retype(model, nodes(model, "FusedInferAttentionScore")[0].input[0], pb.TensorProto.FLOAT)


def mask_dtype(model):
    retype(model, nodes(model, "FusedInferAttentionScore")[0].input[4], pb.TensorProto.FLOAT16)


def list_dtype(model):
    retype(model, nodes(model, "GroupedMatmulV4")[0].input[8], pb.TensorProto.INT32)


FAULTS = {
    "a cache read before its write": (read_cache, "reads cache.0.0 without waiting for its write"),
    "a copied cache": (copy_cache, "copies cache.0.0, which KVCacheScatterUpdate must write where it is"),
    "a cache that nothing writes": (forget_write, "is written 0 times"),
    "a transposed weight": (change_weight("Transpose"), r"\(Transpose\): changes the weight .*weight"),
    "a cast weight": (change_weight("Cast"), r"\(Cast\): changes the weight .*weight"),
    "a large constant": (large_constant, r"\(Constant\): is a constant of 10\d+ bytes"),
    "float64": (widen, r"\(MatMul\): gives float64"),
    "an operator without a kernel": (foreign, "PagedAttention is not among the operators for Ascend"),
    "a head dim that is no multiple of 16": (head_dim(24, slice(0, 3)), "a head dim of 24, expected a multiple"),
    "a head dim above 512": (head_dim(576, slice(0, 3)), "a head dim of 576, expected a multiple of 16 up to 512"),
    "unequal head dims": (head_dim(16, slice(2, 3)), r"has head dims \[16, 32\]"),
    "fused attention in fp32": (attention_dtype, "takes neither bf16 nor fp16"),
    "a mask that is not bool": (mask_dtype, "has a mask that is not bool"),
    "group sizes in int32": (list_dtype, "has a group_list that is not int64"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_the_lint_finds(fault, written):
    change, message = FAULTS[fault]
    record = Bundle.load(written["tiny8-bf16"]).graphs["prefill-32x128"]
    model = mindir.read(written["tiny8-bf16"] / record.file)
    change(model)
    with pytest.raises(ExportError, match=f"prefill-32x128: node .*{message}"):
        lint.check("prefill-32x128", model, [p.name for p in record.caches])


def test_a_graph_that_breaks_a_rule_is_not_written(plans, tmp_path, monkeypatch):
    monkeypatch.delitem(lint.KERNELS, "GeLU")
    with pytest.raises(ExportError, match="vision-64.*: node .*GeLU is not among"):
        export(plans["tiny8-bf16"], tmp_path / "mindir")
    assert list(tmp_path.iterdir()) == []
