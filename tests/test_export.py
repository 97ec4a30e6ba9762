"""Bundles: written without weights, reproducible, equal to the Torch reference, and refused when damaged."""

from __future__ import annotations

import errno
import functools
import json
import os
import shutil
from pathlib import Path

import bundles
import mindspore as ms
import numpy as np
import pytest
from golden import CASES, DATA, check_cache, check_case, inputs, load_case
from mindspore import nn

from kimi_vl.convert.errors import EnvironmentProblem
from kimi_vl.convert.safetensors_file import SafetensorsFile
from kimi_vl.export import (
    BundleError,
    ExportError,
    MindIRModel,
    export,
    lint,
    mindir,
    plan_export,
    verified,
    writing,
)
from kimi_vl.export.bundle import Bundle
from kimi_vl.export.plan import open_converted
from kimi_vl.export.trace import Tracer
from kimi_vl.export.weights import SharedWeights
from kimi_vl.modeling import running
from kimi_vl.modeling.binding import SET_DATA_REBINDS
from kimi_vl.modeling.buckets import TooLongError
from kimi_vl.modeling.engine import Row
from kimi_vl.modeling.kernels import library
from kimi_vl.modeling.modeling_kimi_vl import KimiVLForConditionalGeneration, _has_data

BF16, FP32 = "tiny8-bf16", "tiny8-fp32"


@functools.cache
def loaded(checkpoint: str, operators: bool = True) -> MindIRModel:
    return MindIRModel.from_bundle(bundles.bundle(checkpoint, operators), verify=True)


def plan(checkpoint: str, **changes):
    sizes = {"target": "cpu", **bundles.SIZES[checkpoint], **changes}
    return plan_export(open_converted(bundles.converted(checkpoint)), **sizes)


def small_plan(checkpoint: str):
    """One vision graph, nothing else: quick to write."""
    whole = plan(checkpoint)
    return whole.__class__(**{**vars(whole), "graphs": whole.graphs[:1]})


# The plan ------------------------------------------------------------------------------------------------------------


def names(made) -> list[str]:
    return [g.name for g in made.graphs]


def test_a_plan_has_graphs_for_every_context_and_one_for_all_logits():
    made = plan(BF16, seq=(300,), taps=False, image_patches=())
    assert made.contexts == (256, 300) and made.prefill_chunks == (64,)
    assert names(made)[-5:] == [
        "prefill-64x256", "prefill-64x300", "prefill-logits-64x300", "decode-256", "decode-300",
    ]  # fmt: skip
    assert [n for n in names(made) if n.startswith("vision")] == [f"vision-{n}" for n in made.patches]


def test_contexts_that_hold_no_chunk_only_decode():
    made = plan(BF16, seq=(128, 512), prefill_chunk=256, taps=False)
    assert made.contexts == (128, 256, 512)
    assert [n for n in names(made) if n.startswith("prefill")] == [
        "prefill-256x256", "prefill-256x512", "prefill-logits-256x512",
    ]  # fmt: skip


def test_several_chunk_sizes_have_graphs_each_where_they_fit_and_each_is_traced_once():
    made = plan(BF16, seq=(128, 512), prefill_chunk=(256, 16), taps=True)
    assert made.prefill_chunks == (16, 256)
    assert [n for n in names(made) if n.startswith("prefill")] == [
        "prefill-16x128", "prefill-16x256", "prefill-16x512", "prefill-256x256", "prefill-256x512",
        "prefill-logits-16x512", "prefill-logits-256x512", "prefill-logits-16x512-taps", "prefill-logits-256x512-taps",
    ]  # fmt: skip
    families = [[g.name for g in family] for family, _ in made.families()]
    assert ["prefill-16x128", "prefill-16x256", "prefill-16x512"] in families
    traced = [name for family in families for name in family]
    assert len(set(traced)) == len(traced) and not {"prefill-logits-16x512", "decode-128"} & set(traced)
    assert "prefill-256x512" in [g.name for g in made.shortened().graphs]


def test_by_default_a_bundle_has_the_chunk_sizes_of_the_network(monkeypatch):
    def default(**changes):
        return plan(BF16, **{"prefill_chunk": None, "seq": (2048,), **changes}).prefill_chunks

    assert default() == (64, 256, 1024) and default(seq=(300,)) == (64, 256, 300)
    network = KimiVLForConditionalGeneration.from_pretrained(DATA / BF16, max_context=300).engine.graphs
    assert (*network.smaller_chunks, network.chunk) == (64, 256, 300)
    assert default(target="ascend") == default(target="lite") == (256,)
    with bundles.plain_graphs():
        assert default() == (256,) and default(seq=(128,)) == (128,)


def test_taps_double_what_forward_uses():
    made = plan(BF16, taps=True)
    assert {n for n in names(made) if n.endswith("-taps")} == {
        "vision-64-taps", "prefill-logits-64x256-taps", "decode-128-taps", "decode-256-taps",
    }  # fmt: skip


def test_pictures_that_no_context_holds_have_no_graph_and_that_is_said():
    made = plan(BF16, seq=(300,), image_patches=())
    assert made.patches == (64, 128, 256, 512, 944)  # 236 tokens, and 64 for a question
    assert "room for a picture of 236 tokens" in made.notes[0]
    assert "room for a picture of 448 tokens" in plan(BF16, seq=(512,), image_patches=(6000,)).notes[0]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seq": (10**6,)}, "--seq: 1000000, expected 2 to max_position_embeddings"),
        ({"seq": (1,)}, "--seq: 1,"),
        ({"batch": 0}, "--batch: 0"),
        ({"prefill_chunk": 1}, "--prefill-chunk: 1, expected at least 2"),
        ({"prefill_chunk": (64, 1)}, "--prefill-chunk: 1, expected at least 2"),
        ({"prefill_chunk": 512}, "--prefill-chunk: 512, but the largest context holds 256 tokens"),
        ({"prefill_chunk": (64, 16, 64)}, "--prefill-chunk: 64 is given twice"),
        ({"prefill_chunk": ()}, "--prefill-chunk: no size is given"),
        ({"image_patches": (66,)}, "--image-patches: 66, expected a positive multiple of 4"),
        ({"dtype": "fp16"}, "--dtype: fp16, but .* holds bfloat16; convert"),
    ],
)
def test_sizes_that_cannot_be(changes, message):
    with pytest.raises(ExportError, match=message):
        plan(BF16, **changes)


def test_weights_that_are_widened_anyway_may_be_called_fp32():
    assert plan(BF16, dtype="fp32").dtype == "float32" and plan(BF16).dtype == "bfloat16"


# Writing -------------------------------------------------------------------------------------------------------------


def test_tracing_holds_no_weight_and_taps_change_nothing_else():
    directory, made = bundles.bundle(BF16), plan(BF16, taps=False)
    tracer = Tracer(made.config, made.target, 1, made.weights.dtype)
    for graph in (g for g in made.graphs if g.name in ("vision-64", "decode-128")):
        model = tracer.trace(graph)
        assert not any(p.raw_data for p in model.graph.parameter)
        written = directory / f"{graph.name}.mindir"  # there it was cut out of the graph with taps
        mindir.point_at(model, mindir.pointing(mindir.read(written)))
        assert mindir.serialise(model) == written.read_bytes()
        assert mindir.outputs(model) == list(graph.outputs.values())
    for cell in (tracer.vision_tower, tracer.projector, tracer.language_model):
        assert not any(_has_data(p) for p in cell.get_parameters())


def test_graphs_have_no_large_constants_and_point_at_weights_that_they_take_as_stored():
    for checkpoint, operators, external in ((BF16, True, True), (BF16, False, False), (FP32, False, True)):
        directory = bundles.bundle(checkpoint, operators)
        manifest = Bundle.load(directory)
        for graph in manifest.graphs.values():
            model = mindir.read(directory / graph.file)
            constants = sum(n.ByteSize() for n in model.graph.node if n.op_type == "Constant")
            assert constants < 4 * 256 + 8192, graph.file
            caches = {port.name for port in graph.caches}
            pointing = mindir.pointing(model)
            assert graph.external_data == external
            assert set(pointing) == (set(mindir.parameters(model)) - caches if external else set())
            for name, place in pointing.items():
                weight = manifest.weights[name]
                assert place == (weight.file, weight.offset, weight.nbytes) and weight.offset % 64 == 0


def test_no_weight_is_copied_before_its_layer_runs():
    """The CPU's Reshape copies a parameter, and what waits for nothing runs, and stays, from the start."""
    directory = bundles.bundle(FP32, operators=False)
    for graph in Bundle.load(directory).graphs.values():
        model = mindir.read(directory / graph.file)
        weights = {p.name for p in model.graph.parameter}
        weights |= {
            n.output[0] for n in model.graph.node if lint.operator(n) == "Load" and n.input[0] in weights
        }
        for node in model.graph.node:
            if lint.operator(node) in ("Reshape", "Transpose", "Cast"):
                assert node.input[0] not in weights, f"{graph.file}: {node.op_type} of {node.input[0]}"


def test_shards_are_hard_links_and_the_manifest_knows_their_tensors():
    source, directory = bundles.converted(BF16), bundles.bundle(BF16)
    manifest = Bundle.load(directory)
    assert all((directory / name).samefile(source / name) for name in manifest.shards)
    weights = open_converted(source)
    assert set(manifest.weights) == set(weights.names())
    for name, record in manifest.weights.items():
        assert (record.file, record.offset, record.nbytes) == weights.location(name)
        assert (record.shape, record.dtype) == weights.spec(name) and record.hash == weights.hash(name)


def test_shards_are_copied_across_file_systems(tmp_path, monkeypatch):
    def cross(*_):
        raise OSError(errno.EXDEV, "cross-device link")

    monkeypatch.setattr(os, "link", cross)
    (shard,) = plan(BF16).shards
    assert writing._link(bundles.converted(BF16) / shard, tmp_path / shard)
    assert (tmp_path / shard).read_bytes() == (bundles.converted(BF16) / shard).read_bytes()
    assert not (tmp_path / shard).is_symlink()
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(EnvironmentProblem, match="cannot be linked"):
        writing._link(bundles.converted(BF16) / shard, tmp_path / "again")


def test_a_copy_survives_the_converted_directory_and_any_bundle_may_move(tmp_path):
    ckpt = Path(shutil.copytree(bundles.converted(FP32), tmp_path / "ckpt"))
    made = plan_export(open_converted(ckpt), target="cpu", **bundles.SIZES[FP32], copy=True)
    written = export(made, tmp_path / "mindir")
    assert written.copied == tuple(made.shards) and written.nbytes > sum(made.shards.values())
    assert not any((tmp_path / "mindir" / name).samefile(ckpt / name) for name in made.shards)
    for name in made.shards:
        (ckpt / name).write_bytes(b"")  # a link would be emptied with it
    shutil.rmtree(ckpt)
    (tmp_path / "elsewhere").mkdir()
    moved = (tmp_path / "mindir").rename(tmp_path / "elsewhere/renamed")
    assert sorted(p.name for p in moved.iterdir()) == sorted(p.name for p in bundles.bundle(FP32).iterdir())
    model, case = MindIRModel.from_bundle(moved, verify=True), load_case(FP32, "text")
    new = model.generate(**inputs(case), max_new_tokens=4, eos_token_id=None).asnumpy()
    assert np.array_equal(new[:, -4:], case["greedy_tokens"][:, :4])


def test_a_copy_that_has_no_room_is_refused_before_anything_is_traced(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(writing, "_write_graphs", lambda *_: pytest.fail("traced"))
    with pytest.raises(
        EnvironmentProblem, match="to copy the weights .* are needed there but 1.00 kB are free"
    ):
        export(plan(FP32, copy=True), tmp_path / "new/mindir")
    assert list(tmp_path.iterdir()) == []


def test_a_target_that_is_no_bundle_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    for dst in (tmp_path, tmp_path / "mine.txt"):
        with pytest.raises(ExportError, match="is not empty|is a file"):
            export(small_plan(BF16), dst)
    (tmp_path / "bundle.json").write_text("{}")
    with pytest.raises(ExportError, match="damaged bundle"):
        export(small_plan(BF16), tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle.json", "mine.txt"]


def test_an_older_bundle_is_replaced_only_by_a_whole_one(tmp_path):
    target = bundles.copy(FP32, tmp_path / "mindir")
    (target / "note.txt").write_text("of the older bundle")

    def interrupt(name, done):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(small_plan(FP32), target, interrupt)
    assert (target / "note.txt").exists() and [p.name for p in tmp_path.iterdir()] == ["mindir"]
    with pytest.raises(
        ExportError, match="no graph uses it"
    ):  # the text weights; also after graphs were written
        export(small_plan(FP32), target)
    assert (target / "note.txt").exists() and [p.name for p in tmp_path.iterdir()] == ["mindir"]
    writing._replace(target, Path(shutil.copytree(bundles.bundle(FP32), tmp_path / "new")))
    assert not (target / "note.txt").exists() and [p.name for p in tmp_path.iterdir()] == ["mindir"]
    Bundle.load(target)


def test_weights_of_another_shape_are_refused():
    made = plan(BF16)
    name = "multi_modal_projector.linear_1.bias"
    found = {name: ((7,), "float32")}
    with pytest.raises(ExportError, match=f"{name}: vision-64 takes"):
        writing._check_parameters(made, made.graphs[0], found)
    with pytest.raises(ExportError, match="nobody.weight: vision-64 needs it"):
        writing._check_parameters(made, made.graphs[0], {"nobody.weight": ((7,), "float32")})


# Running -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint, name", CASES)
def test_a_reloaded_bundle_equals_torch(checkpoint, name):
    model, case = loaded(checkpoint), load_case(checkpoint, name)
    check_case(model, case, taps=model.bundle.taps)
    check_cache(model, case)


@pytest.mark.parametrize("checkpoint, name", [(BF16, "images2"), (BF16, "long"), (FP32, "batch")])
def test_so_does_one_of_plain_graphs(checkpoint, name):
    model, case = loaded(checkpoint, operators=False), load_case(checkpoint, name)
    check_case(model, case, taps=model.bundle.taps)
    check_cache(model, case)


def test_a_bundle_knows_no_file_of_the_machine_that_made_it():
    directory = bundles.bundle(BF16)
    assert Bundle.load(directory).kernels == "cpu"
    for file in directory.iterdir():
        assert str(library.path().parent).encode() not in file.read_bytes(), file.name


def test_a_bundle_that_calls_operators_is_refused_where_there_are_none(monkeypatch):
    monkeypatch.setattr(library, "why_not", lambda: "not built here; install a compiler")
    with pytest.raises(
        BundleError, match="call the library of CPU operators, which is not built here; install a"
    ):
        MindIRModel.from_bundle(bundles.bundle(BF16))
    MindIRModel.from_bundle(bundles.bundle(BF16, operators=False))


def test_a_prompt_takes_the_chunk_that_it_fills():
    model = MindIRModel.from_bundle(bundles.bundle(FP32))
    for count, graphs in (
        (20, {"prefill-32x256"}),
        (40, {"prefill-64x256"}),
        (65, {"prefill-64x256", "decode-256"}),
    ):
        model.engine.graphs.loaded.clear()
        model.engine.extend(model.engine.new_cache(2), [Row(np.arange(count)), Row(np.arange(2))])
        assert model.used == graphs


def test_a_bundle_of_one_chunk_size_reads_as_ever():
    """Its manifest is as before there were several."""
    manifest = json.loads((bundles.bundle(BF16) / "bundle.json").read_text())
    assert (manifest["schema"], manifest["prefill_chunk"]) == (1, 64) and "smaller_chunks" not in manifest
    graphs = loaded(BF16).engine.graphs
    assert (graphs.chunk, graphs.smaller_chunks) == (64, ())
    assert loaded(FP32).engine.graphs.smaller_chunks == (32,)


def test_the_mode_of_the_caller_does_not_matter_and_stays():
    model, case = loaded(FP32), load_case(FP32, "text")
    before = ms.get_context("mode")
    try:
        for mode in (ms.GRAPH_MODE, ms.PYNATIVE_MODE):
            ms.set_context(mode=mode)
            new = model.generate(**inputs(case), max_new_tokens=4, eos_token_id=None).asnumpy()
            assert np.array_equal(new[:, -4:], case["greedy_tokens"][:, :4])
            assert ms.get_context("mode") == mode
    finally:
        ms.set_context(mode=before)


def test_a_bundle_stands_alone(tmp_path):
    directory = bundles.copy(BF16, tmp_path / "elsewhere")
    model, case = MindIRModel.from_bundle(directory), load_case(BF16, "text")
    assert model.dtype == ms.bfloat16 and model.config.model_type == "kimi_vl"
    assert model.generation_config.eos_token_id
    new = model.generate(**inputs(case), max_new_tokens=4, eos_token_id=None).asnumpy()
    assert np.array_equal(new[:, -4:], case["greedy_tokens"][:, :4])


@pytest.mark.skipif(not SET_DATA_REBINDS, reason="MindSpore 2.7 does not say where an array's tensor lies")
def test_weights_are_held_once_and_mapped_where_they_are_stored_as_needed():
    for checkpoint, operators, mapped in ((BF16, True, True), (BF16, False, False), (FP32, True, True)):
        model, case = loaded(checkpoint, operators), load_case(checkpoint, "text")
        model.generate(**inputs(case), max_new_tokens=2)
        graphs = list(model.engine.graphs.loaded.values())
        assert len(graphs) >= 2
        name = "language_model.lm_head.weight"
        held = model.weights.tensor(name).data_ptr()
        for graph in graphs:
            parameter = graph._cell.parameters_dict().get(name)
            assert parameter is None or parameter.data_ptr() == held
        assert (held == model.weights._stored(name).ctypes.data) == mapped


def test_each_weight_is_brought_to_a_device_once(monkeypatch):
    brought = []
    monkeypatch.setattr(running, "on_device", lambda tensor: (brought.append(tensor), tensor)[1])
    model, case = MindIRModel.from_bundle(bundles.bundle(FP32)), load_case(FP32, "image")
    model.generate(**inputs(case), max_new_tokens=2)
    assert {g._record.kind for g in model.engine.graphs.loaded.values()} == {"vision", "prefill", "decode"}
    assert len(brought) == len(model.bundle.weights)


@pytest.mark.parametrize(
    "checkpoint, operators, widened", [(BF16, False, True), (BF16, True, False), (FP32, True, False)]
)
def test_what_is_widened_is_not_held_as_stored_too(checkpoint, operators, widened, monkeypatch):
    directory = bundles.bundle(checkpoint, operators)
    weights = SharedWeights(directory, Bundle.load(directory))
    forgotten: list[str] = []
    monkeypatch.setattr(SafetensorsFile, "forget", lambda _, name: forgotten.append(name))
    weights.tensor("language_model.lm_head.weight")
    weights.tensor("language_model.model.layers.1.mlp.gate.weight")  # fp32 in every checkpoint
    assert forgotten == ["language_model.lm_head.weight"] * widened


def test_plain_mindspore_loads_a_graph_of_fp32_weights():
    directory, model = bundles.bundle(FP32, operators=False), loaded(FP32, operators=False)
    record = model.bundle.graphs["vision-64"]
    cell = nn.GraphCell(ms.load(str(directory / record.file)))
    rng = np.random.default_rng(0)
    feed = model.engine.vision_inputs(rng.standard_normal((24, 3, 14, 14), np.float32), 4, 6, 64)
    (got,) = cell(*(ms.Tensor(feed[port.name]) for port in record.inputs))
    got = got.asnumpy()
    assert np.array_equal(got, model.engine.graphs.vision(64, feed, False)[0])
    assert got.any()


def test_what_a_bundle_does_not_hold_is_said():
    case = load_case(FP32, "text")
    with pytest.raises(BundleError, match="export with --taps"):
        loaded(FP32)(**inputs(case), output_taps=True)
    with pytest.raises(TooLongError, match="exceeds the context of 256 by 44"):
        loaded(FP32).generate(input_ids=np.ones((1, 300), np.int64))


# Damage --------------------------------------------------------------------------------------------------------------


def shard(directory: Path) -> Path:
    (path,) = directory.glob("*.safetensors")
    return path


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def flip_tensor(directory: Path, name: str) -> None:
    flip(shard(directory), Bundle.load(directory).weights[name].offset)


def other_shard(directory: Path) -> None:
    """Of one layer's weights, another's."""
    weights = Bundle.load(directory).weights
    content = bytearray(shard(directory).read_bytes())
    a, b = (weights[f"language_model.model.layers.{i}.input_layernorm.weight"] for i in (0, 1))
    content[a.offset : a.offset + a.nbytes] = content[b.offset : b.offset + b.nbytes]
    shard(directory).write_bytes(content)


def shard_of_its_shape(directory: Path) -> None:
    """The shard of another model whose header and small tensors are the same."""
    content = bytearray(shard(directory).read_bytes())
    for record in Bundle.load(directory).weights.values():
        if record.nbytes > LARGE:
            tensor = np.frombuffer(content, np.uint8, record.nbytes, record.offset)
            tensor[:] = np.roll(tensor, 4)
    shard(directory).write_bytes(content)


def link_out(file: Path) -> None:
    outside = file.parent.parent / file.name
    file.rename(outside)
    file.symlink_to(outside)


def point_wrongly(directory: Path, **changes: int) -> None:
    """A graph that finds other data for a weight than the manifest says."""
    path = directory / "vision-64.mindir"
    model = mindir.read(path)
    place = model.graph.parameter[0].external_data
    for field, change in changes.items():
        setattr(place, field, getattr(place, field) + change)
    path.write_bytes(mindir.serialise(model))
    bundles.edit(directory, lambda m: None)


def graph_of_another(directory: Path, manifest_too: bool = False) -> None:
    other = bundles.bundle(BF16, operators=False)
    shutil.copyfile(other / "decode-256.mindir", directory / "decode-256.mindir")
    if manifest_too:
        bundles.edit(directory, lambda m: None)


def drop_weight(manifest: dict) -> None:
    del manifest["weights"]["multi_modal_projector.linear_1.bias"]


def rename_cache(manifest: dict) -> None:
    manifest["graphs"]["decode-256"]["caches"][0]["name"] = "cache.9.9"


def set_cache(manifest: dict) -> None:
    manifest["graphs"]["decode-256"]["caches"][0]["shape"] = [128, 64]


LARGE = 1 << 16  # bytes; a tensor up to this is read at every load
BIG = "language_model.model.layers.1.mlp.experts.gate_up_proj"
SMALL = "language_model.model.norm.weight"
DAMAGE = {
    "a flipped bit in a graph": (
        lambda d: flip(d / "decode-256.mindir", 5000),
        "decode-256.mindir: is not the file",
    ),
    "a truncated graph": (
        lambda d: os.truncate(d / "decode-256.mindir", 99),
        "decode-256.mindir: has 99 bytes",
    ),
    "no graph": (lambda d: (d / "decode-256.mindir").unlink(), "decode-256.mindir: is missing"),
    "a changed configuration": (lambda d: flip(d / "config.json", 300), "config.json: is not the file"),
    "a truncated shard": (lambda d: os.truncate(shard(d), 9999), "safetensors: has 9999 bytes"),
    "no shard": (lambda d: shard(d).unlink(), "safetensors: is missing"),
    "a damaged header": (lambda d: flip(shard(d), 100), "safetensors: is (damaged|another model)"),
    "a flipped bit in a small tensor": (
        lambda d: flip_tensor(d, SMALL),
        f"{SMALL} is damaged or another model's",
    ),
    "a flipped bit in a large tensor": (
        lambda d: flip_tensor(d, BIG),
        f"{BIG} is damaged or another model's",
    ),
    "another model's shard of the same shapes": (shard_of_its_shape, "is damaged or another model's"),
    "another layer's weights": (other_shard, "layers.0.input_layernorm.weight is damaged or another model's"),
    "a file that is a link out of the bundle": (
        lambda d: link_out(d / "config.json"),
        "config.json: is a link to .*, outside the bundle",
    ),
    "a shard that is a link out of the bundle": (
        lambda d: link_out(shard(d)),
        "safetensors: is a link to .*, outside the bundle",
    ),
    "another bundle's graph": (graph_of_another, "decode-256.mindir: has|decode-256.mindir: is not the file"),
    "another bundle's graph, with a manifest that says so": (
        lambda d: graph_of_another(d, manifest_too=True),
        "decode-256.mindir: does not take cache.0.1, which bundle.json names",
    ),
    "no manifest": (lambda d: (d / "bundle.json").unlink(), "has no bundle.json"),
    "half a manifest": (lambda d: os.truncate(d / "bundle.json", 999), "bundle.json: is not valid JSON"),
    "another JSON": (lambda d: (d / "bundle.json").write_text("[]"), "is no manifest of a bundle"),
    "a newer manifest": (
        lambda d: bundles.edit(d, lambda m: m.update(schema=2)),
        "schema 2, .* update kimi_vl",
    ),
    "a manifest without batch": (
        lambda d: bundles.edit(d, lambda m: m.pop("batch")),
        "json: batch is missing",
    ),
    "a batch of text": (
        lambda d: bundles.edit(d, lambda m: m.update(batch="2")),
        "batch is '2', expected int",
    ),
    "a file outside": (
        lambda d: bundles.edit(d, lambda m: m["graphs"]["decode-256"].update(file="../x.mindir")),
        "'../x.mindir' is no plain file name",
    ),
    "an unaligned weight": (
        lambda d: bundles.edit(d, lambda m: m["weights"][SMALL].update(offset=130)),
        f"weights.{SMALL} is at offset 130, expected a multiple of 64",
    ),
    "a weight elsewhere": (
        lambda d: bundles.edit(d, lambda m: m["weights"][SMALL].update(offset=64 * 99)),
        f"{SMALL} is not where bundle.json says",
    ),
    "a weight of another length": (
        lambda d: bundles.edit(d, lambda m: m["weights"][SMALL].update(nbytes=4)),
        f"weights.{SMALL} has 4 bytes",
    ),
    "a wrong offset in a graph": (
        lambda d: point_wrongly(d, offset=64),
        "vision-64.mindir: .* is not where bundle.json says",
    ),
    "a wrong length in a graph": (
        lambda d: point_wrongly(d, length=-64),
        "vision-64.mindir: .* is not where bundle.json says",
    ),
    "a parameter without data": (
        lambda d: bundles.edit(d, drop_weight),
        "linear_1.bias is not where bundle.json says",
    ),
    "a cache that is not there": (
        lambda d: bundles.edit(d, rename_cache),
        "cache.0.0 has no data in the bundle",
    ),
    "a cache of another shape": (lambda d: bundles.edit(d, set_cache), "cache.0.0 is float32 .256, "),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named_before_a_graph_runs(damage, tmp_path):
    make, message = DAMAGE[damage]
    directory = bundles.copy(FP32, tmp_path / "mindir")
    make(directory)
    case = load_case(FP32, "image")
    with pytest.raises(BundleError, match=message) as e:
        MindIRModel.from_bundle(directory).generate(**inputs(case), max_new_tokens=2)
    assert "\n" not in str(e.value)


def test_a_parameter_that_no_shard_has_is_named(tmp_path):
    directory = bundles.copy(
        BF16, tmp_path / "mindir", operators=False
    )  # its graphs point at no data of their own
    bundles.edit(directory, drop_weight)
    case = load_case(BF16, "image")
    with pytest.raises(BundleError, match=r"vision-64.mindir: .*linear_1.bias has no data in the bundle"):
        MindIRModel.from_bundle(directory).generate(**inputs(case), max_new_tokens=2)


# What was checked is remembered --------------------------------------------------------------------------------------


@pytest.fixture
def settled(tmp_path, monkeypatch) -> Path:
    """A bundle whose files are old enough."""
    monkeypatch.setattr(verified, "SETTLED", 0.0)
    return bundles.copy(FP32, tmp_path / "mindir")


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Names of tensors that were read to be checked."""
    names: list[str] = []
    content = SharedWeights._content
    monkeypatch.setattr(
        SharedWeights, "_content", lambda self, name: (names.append(name), content(self, name))[1]
    )
    return names


def test_large_tensors_are_read_by_the_first_load_only(settled, read):
    everything = set(Bundle.load(settled).weights)
    MindIRModel.from_bundle(settled)
    assert set(read) == everything
    for verify, again in ((None, False), (False, False), (True, True)):
        read.clear()
        MindIRModel.from_bundle(settled, verify=verify)
        assert (BIG in read) == again and SMALL in read
    link = settled.parent / "moved"
    settled.rename(link)
    read.clear()
    MindIRModel.from_bundle(link)
    assert BIG not in read


def test_verify_false_reads_no_large_tensor(tmp_path, read):
    directory = bundles.copy(FP32, tmp_path / "mindir")
    flip_tensor(directory, BIG)
    MindIRModel.from_bundle(directory, verify=False)
    assert BIG not in read


def touch_in_place(path: Path, at: int) -> None:
    """Damage that keeps the size, the inode and the date of the file."""
    before = path.stat()
    with open(path, "r+b") as f:
        f.seek(at)
        byte = f.read(1)[0]
        f.seek(at)
        f.write(bytes([byte ^ 1]))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    after = path.stat()
    assert (after.st_size, after.st_ino, after.st_mtime_ns) == (
        before.st_size,
        before.st_ino,
        before.st_mtime_ns,
    )


def test_a_file_that_changed_is_read_again_whatever_its_date(settled):
    MindIRModel.from_bundle(settled)
    touch_in_place(shard(settled), Bundle.load(settled).weights[BIG].offset)
    with pytest.raises(BundleError, match=f"{BIG} is damaged or another model's"):
        MindIRModel.from_bundle(settled)


def test_what_another_manifest_says_of_the_same_file_is_not_believed(settled):
    MindIRModel.from_bundle(settled)
    bundles.edit(settled, lambda m: m["weights"][BIG].update(hash="0" * 64))
    with pytest.raises(BundleError, match=f"{BIG} is damaged or another model's"):
        MindIRModel.from_bundle(settled)


def test_a_file_that_just_changed_is_not_remembered(tmp_path, read):
    directory = bundles.copy(FP32, tmp_path / "mindir")
    for _ in range(2):
        read.clear()
        MindIRModel.from_bundle(directory)
        assert BIG in read


def test_a_cache_that_cannot_be_written_or_is_damaged_does_no_harm(settled, read, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no directory")
    monkeypatch.setattr(verified, "directory", lambda: tmp_path / "file")
    for _ in range(2):
        read.clear()
        MindIRModel.from_bundle(settled)
        assert BIG in read
    monkeypatch.setattr(verified, "directory", lambda: tmp_path / "claims")
    MindIRModel.from_bundle(settled)
    for claim in (tmp_path / "claims").iterdir():
        claim.write_text("{")
    read.clear()
    MindIRModel.from_bundle(settled)
    assert BIG in read


# Devices -------------------------------------------------------------------------------------------------------------


def test_a_bundle_for_another_device_is_refused(monkeypatch):
    monkeypatch.setattr(running, "device", lambda: "Ascend")
    with pytest.raises(
        BundleError, match="is for cpu, but MindSpore runs on Ascend; export with --target ascend"
    ):
        MindIRModel.from_bundle(bundles.bundle(FP32))


def test_on_a_cpu_too_a_cache_is_read_only_as_what_its_write_gives():
    """What runs nodes in another order than the file's would read it before the write."""
    directory = bundles.bundle("tiny8-bf16")
    record = Bundle.load(directory).graphs["decode-128"]
    model = mindir.read(directory / record.file)
    given = {p.name: (p.shape, p.dtype) for p in record.inputs}
    lint.check("decode-128", model, [p.name for p in record.caches], given, device=False)
    write = next(n for n in model.graph.node if lint.operator(n) == "ScatterUpdate")
    for node in model.graph.node:
        node.input[:] = [write.input[0] if v == write.output[0] else v for v in node.input]
    with pytest.raises(ExportError, match="reads cache.0.0 without waiting for its write"):
        lint.check("decode-128", model, [p.name for p in record.caches], given, device=False)
