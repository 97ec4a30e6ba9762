"""Golden packs: what is in them, what they are good for, and what is refused."""

from __future__ import annotations

import json
import shutil

import ml_dtypes
import numpy as np
import packs
import pytest
from click.testing import CliRunner

from kimi_vl.convert.manifest import content_hash
from kimi_vl.export.device import device_pack, device_play
from kimi_vl.export.device.device_pack import PackError, read_pack, write_pack
from kimi_vl.verify.cli import cli
from kimi_vl.verify.golden import GoldenError

pytestmark = pytest.mark.usefixtures("one_torch_thread")
EXPERTS = "language_model.model.layers.1.mlp.experts.down_proj"


def test_the_same_recording_gives_the_same_bytes(tmp_path):
    again = packs.record(packs.bundle("ascend"), tmp_path / "again.npz")
    assert (tmp_path / "again.npz").read_bytes() == packs.pack_file("ascend").read_bytes()
    assert again.digest == packs.pack("ascend").digest
    assert (tmp_path / "again.npz").stat().st_size < 500_000


def test_a_pack_holds_the_calls_that_the_product_makes():
    pack = packs.pack("ascend")
    image, pieces = pack.cases
    assert [c["graph"] for c in image["calls"]] == ["vision-64", "prefill-logits-64x128"]
    assert [c["count"] for c in pieces["calls"]] == [[28], [9], [2], [5], [1]]
    network = [
        "vision_out",
        "projector_out",
        "layers.0",
        "router.1",
        "layers.1",
        "router.2",
        "layers.2",
        "logits",
    ]
    assert list(image["limits"]) == [*network, "tapped_logits", "greedy"]
    kinds = [c["kind"] for c in image["greedy"]["calls"]]
    assert kinds == ["prefill"] + ["decode"] * 31 and pieces["greedy"] is None
    assert all(c["taps_graph"] == f"{c['graph']}-taps" for c in image["calls"])
    assert sorted(n for c in pieces["calls"] for n, _, _ in c["tokens"]) == list(range(45))
    names = set(pack.index["bundle"]["files"])
    assert {"run_on_device.py", "decode-128.mindir", "model-00001-of-00001.safetensors"} <= names


@pytest.mark.parametrize("target", ["cpu", "ascend"])
def test_a_bundle_is_within_its_own_limits(target):
    """The CPU's in fp32, that for a device with every result rounded to bf16."""
    for case in packs.pack(target).cases:
        found = packs.figures(target, case, packs.observed(target, case))
        findings = device_play.judge(case, found)
        assert {f["tap"] for f in findings} == set(case["limits"]) and all(f["ok"] for f in findings)
        largest = max(limits.get("rel_l2", 0.0) for limits in case["limits"].values())
        assert largest == 1e-5 if target == "cpu" else 2**-8 <= largest < 0.1


def test_wrong_experts_are_seen_where_they_are():
    """In the layer that has them, and in none before it."""
    for case in packs.pack("ascend").cases:
        found = packs.figures("ascend", case, packs.observed("ascend", case, swapped=EXPERTS))
        wrong = [f["tap"] for f in device_play.judge(case, found) if not f["ok"]]
        assert "layers.1" in wrong and "logits" in wrong
        assert not {"layers.0", "router.1", "projector_out", "vision_out"} & set(wrong)


def test_stages_give_the_same_as_the_whole():
    """Each is run in a process of its own on a device."""
    case = packs.pack("cpu").case("pieces")
    whole, tapped, _ = packs.observed("cpu", case)
    assert whole["reached"].all() and not whole["pictured"].size
    figures = device_play.figures(packs.pack("cpu"), case, whole, tapped)
    assert figures["layers.0"]["places"] == len(case["sampled"]) and figures["router.1"]["places"] == 45


def test_a_nan_fails_whatever_it_is_near():
    case = packs.pack("cpu").case("image")
    plain, tapped, tokens = packs.observed("cpu", case)
    tapped = tapped | {"hidden": tapped["hidden"].copy()}
    tapped["hidden"][1, 0, 0] = np.nan
    found = packs.figures("cpu", case, (plain, tapped, tokens))
    wrong = {(f["tap"], f["metric"]) for f in device_play.judge(case, found) if not f["ok"]}
    assert wrong == {("layers.1", "nonfinite"), ("layers.1", "rel_l2")}


def test_a_token_that_is_not_the_second_best_leaves_the_reference():
    case = packs.pack("ascend").case("image")
    plain, tapped, tokens = packs.observed("ascend", case)
    assert packs.figures("ascend", case, (plain, tapped, tokens))["greedy"]["left"] == 0
    other = packs.pack("ascend").arrays[case["greedy"]["tokens"]].copy()
    unlikely = {int(other[0, 5]), int(packs.pack("ascend").arrays[case["greedy"]["seconds"]][0, 5])}
    other[0, 5] = next(t for t in range(3) if t not in unlikely)
    found = packs.figures("ascend", case, (plain, tapped, other))["greedy"]
    assert (found["left"], found["same"]) == (1, 5)


def test_a_bundle_without_taps_is_judged_by_what_it_gives(tmp_path):
    pack = packs.record(packs.bundle("cpu", taps=False), tmp_path / "p.npz", ("image",))
    (case,) = pack.cases
    assert not pack.index["taps"] and all(c["taps_graph"] is None for c in case["calls"])
    assert set(case["limits"]) == {"projector_out", "logits", "greedy"}
    assert set(case["expected"]) == {"features", "feature_norms", "logit_ids", "logits"}


def test_a_bundle_that_is_wrong_itself_gets_no_pack(tmp_path):
    """Its weights agree with its manifest, and are another model's in one place."""
    wrong = tmp_path / "wrong"
    shutil.copytree(packs.bundle("ascend"), wrong)
    manifest = json.loads((wrong / "bundle.json").read_text())
    weight = manifest["weights"][EXPERTS]
    path = wrong / weight["file"]
    content = bytearray(path.read_bytes())
    path.unlink()
    place = slice(weight["offset"], weight["offset"] + weight["nbytes"])
    held = np.frombuffer(content[place], ml_dtypes.bfloat16).reshape(weight["shape"])
    content[place] = held[::-1].tobytes()
    path.write_bytes(content)
    weight["hash"] = content_hash(bytes(content[place]))
    (wrong / "bundle.json").write_text(json.dumps(manifest))
    with pytest.raises(GoldenError, match=r"case image, layers\.1: rel_l2 .* no pack is made"):
        packs.record(wrong, tmp_path / "p.npz")
    assert not (tmp_path / "p.npz").exists()


@pytest.mark.slow
def test_rows_that_share_a_cache_parameter_are_recorded_as_the_loader_runs_them(tmp_path):
    """Three prompts in batches of two; that the calls are right is what recording itself requires."""
    pack = packs.record(packs.bundle("ascend", batch=2), tmp_path / "p.npz", ("batch", "batch-steps"))
    batch, steps = pack.cases
    assert [c["rows"] for c in batch["calls"] if c["kind"] != "vision"] == [[0, 1], [2, None]]
    assert [c["feeds"] for c in batch["greedy"]["calls"]][2:4] == [[[0, 0], [1, 1]], [[2, 0]]]
    assert sum(sum(c["count"]) for c in steps["calls"] if c["kind"] != "vision") == steps["tokens"]


def test_a_damaged_pack_is_refused(tmp_path):
    content = packs.pack_file("cpu").read_bytes()
    path = tmp_path / "p.npz"
    for damaged in (b"", content[:1000], content[:-300], content[:5000] + b"\0" + content[5001:]):
        path.write_bytes(damaged)
        with pytest.raises(PackError, match="damaged"):
            read_pack(path)
    pack = packs.pack("cpu")
    name, array = next(iter(pack.arrays.items()))
    index = {k: v for k, v in pack.index.items() if k != "digest"}
    write_pack(path, index, pack.arrays | {name: array + 1})
    with np.load(path) as members:
        arrays = dict(members)
    arrays[name] = array
    np.savez_compressed(path, **arrays)
    with pytest.raises(PackError, match="digest"):
        read_pack(path)


def test_a_pack_of_another_version_or_bundle_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(device_pack, "VERSION", 2)
    with pytest.raises(PackError, match="version 1, this program reads"):
        read_pack(packs.pack_file("cpu"))
    with pytest.raises(PackError, match="record a pack for this bundle"):
        packs.pack("cpu").require_bundle(packs.bundle("ascend"))


def test_a_pack_that_is_too_large_is_not_written(tmp_path, monkeypatch):
    monkeypatch.setattr(device_pack, "LARGEST", 1000)
    pack = packs.pack("cpu")
    with pytest.raises(PackError, match="record fewer cases with --cases"):
        write_pack(tmp_path / "p.npz", pack.index, pack.arrays)
    assert not list(tmp_path.iterdir())


def test_the_command_records_and_says_what_it_left_out(tmp_path):
    out = tmp_path / "p.npz"
    arguments = (
        "record",
        "--reference",
        packs.TINY,
        "--candidate",
        packs.bundle("cpu", taps=False),
        "--out",
        out,
    )
    cases = ("--cases", "text", "--cases", "bucket")
    result = CliRunner().invoke(cli, [*map(str, arguments), *cases], prog_name="verify-parity")
    assert result.exit_code == 0, result.output
    assert "without case bucket: the cache has only one length" in result.stderr
    assert "no single layer" in result.stderr and "1 cases" in result.stdout
    assert [c["name"] for c in read_pack(out).cases] == ["text"]
