"""`run_on_device.py`, started from a bundle as a user would: what holds, and that what does not fails alone and at its place."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import bundles
import packs
import pytest

from kimi_vl.export import export, plan_export
from kimi_vl.export.device import device_report, scripts
from kimi_vl.export.device.device_graphs import DeviceBundle
from kimi_vl.export.plan import open_converted
from kimi_vl.modeling.kernels import library


def climb(bundle: Path, report: Path, *arguments: object, **environment: str) -> tuple[int, str, dict]:
    """Status, what was printed, and the rungs by name."""
    command = [sys.executable, bundle / "run_on_device.py", "--device", "CPU", "--report", report, *arguments]
    done = subprocess.run(
        list(map(str, command)),
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": ""} | environment,
    )
    rungs = device_report.read_report(report)["rungs"] if report.is_file() else []
    return done.returncode, done.stdout + done.stderr, {rung["name"]: rung for rung in rungs}


def copied(target: str, to: Path) -> Path:
    return Path(shutil.copytree(packs.bundle(target), to))


def test_a_bundle_carries_the_scripts_and_they_need_neither_torch_nor_this_package():
    carried = scripts("cpu")
    assert "run_on_device.py" in carried and scripts("elsewhere") == {}
    manifest = json.loads((packs.bundle("ascend") / "bundle.json").read_text())
    for name, path in carried.items():
        text = path.read_text()
        assert (packs.bundle("ascend") / name).read_text() == text and name in manifest["files"]
        assert not any(
            f"import {m}" in text or f"from {m}" in text for m in ("torch", "kimi_vl", "ml_dtypes", "click")
        )


def test_a_bundle_for_this_machine_holds_from_the_ground_to_decoding(tmp_path):
    pack = packs.pack_file("cpu")
    rungs = "environment,files,pack,device,layer,decode,capture"
    status, said, found = climb(packs.bundle("cpu"), tmp_path / "r.json", "--pack", pack, "--rungs", rungs)
    assert status == 0, said
    assert {n: r["status"] for n, r in found.items()} == {
        **dict.fromkeys(rungs.split(","), "passed"), "capture": "skipped"
    }  # fmt: skip
    assert [i["item"] for i in found["layer"]["items"]] == [
        "the first layer",
        "layers 0 to 1, the first with experts",
    ]
    report = device_report.read_report(tmp_path / "r.json")
    assert report["pack"] == packs.pack("cpu").digest and report["device"]["name"] == "CPU"
    page = (tmp_path / "r.md").read_text()
    assert (
        "| decode | passed | 1 of 1 |" in page and "in place, before it is read | cache | not run |" in page
    )


@pytest.mark.skipif(not library.path().exists(), reason="there was no C++ compiler at install")
def test_a_bundle_that_calls_the_cpu_operators_is_refused(tmp_path):
    status, said, found = climb(bundles.bundle("tiny8-bf16"), tmp_path / "r.json")
    assert status == 2 and not found
    assert said.count("\n") == 1 and "C++ operators" in said and "KIMI_VL_KERNELS=off" in said


@pytest.mark.skipif(
    version("mindspore").startswith("2.7."),
    reason="MindSpore 2.7 crashes on a CPU when a graph's parameter is set after it ran",
)
def test_a_chunk_may_fill_the_smallest_context(tmp_path):
    weights = open_converted(bundles.converted("tiny8-bf16"))
    sizes = {"seq": (32, 64), "prefill_chunk": 32, "image_patches": (64,), "batch": 2}
    with bundles.plain_graphs():
        export(plan_export(weights, target="cpu", **sizes), tmp_path / "b")
    status, said, found = climb(tmp_path / "b", tmp_path / "r.json", "--rungs", "cache")
    assert status == 0, said
    assert [item["item"] for item in found["cache"]["items"]][:2] == [
        "in place, prefill-32x32",
        "in place, decode-32",
    ]


def test_graphs_of_a_kind_come_by_context_and_then_by_chunk(tmp_path):
    sizes = [(1024, 2048), (256, 1024), (1024, 1024), (64, 1024)]
    graphs = {
        f"prefill-{n}x{context}": {
            "kind": "prefill",
            "taps": False,
            "patches": None,
            "tokens": n,
            "context": context,
        }
        for n, context in sizes
    }
    (tmp_path / "bundle.json").write_text(json.dumps({"graphs": graphs, "weights": {}}))
    assert DeviceBundle(tmp_path).of_kind("prefill") == [
        "prefill-64x1024", "prefill-256x1024", "prefill-1024x1024", "prefill-1024x2048",
    ]  # fmt: skip


def test_what_this_machine_has_no_kernels_for_fails_in_a_sentence_and_alone(tmp_path):
    arguments = ("--pack", packs.pack_file("ascend"), "--rungs", "files,prefill,decode", "--only", "e")
    status, said, found = climb(packs.bundle("ascend"), tmp_path / "r.json", *arguments)
    assert status == 1 and "FAILED: prefill, decode; report:" in said
    assert found["files"]["status"] == "passed"
    assert [i["ok"] for i in found["prefill"]["items"]] == [False, False]
    assert found["decode"]["says"].endswith("Select CPU operator[Gather] fail! Unsupported data type!")


def test_a_wrong_weight_is_seen_in_its_file_and_in_its_layer(tmp_path):
    bundle = copied("cpu", tmp_path / "b")
    manifest = json.loads((bundle / "bundle.json").read_text())
    weight = manifest["weights"]["language_model.model.layers.0.self_attn.o_proj.weight"]
    path = bundle / weight["file"]
    content = bytearray(path.read_bytes())
    content[weight["offset"] + 1] ^= 0x20  # in the exponent
    path.unlink()
    path.write_bytes(content)
    arguments = ("--pack", packs.pack_file("cpu"), "--rungs", "files,pack,layer")
    status, said, found = climb(bundle, tmp_path / "r.json", *arguments)
    assert status == 1 and [r["status"] for r in found.values()] == ["failed", "passed", "failed"], said
    assert f"{weight['file']} is not the file that the pack was recorded for" in found["files"]["says"]
    assert found["layer"]["says"].startswith("the first layer: relative L2")


def test_a_pack_of_another_bundle_and_a_stale_graph_are_seen(tmp_path):
    bundle = copied("cpu", tmp_path / "b")
    arguments = ("--pack", packs.pack_file("ascend"), "--rungs", "files,pack,prefill")
    status, said, found = climb(bundle, tmp_path / "r.json", *arguments)
    assert status == 1 and [r["status"] for r in found.values()] == ["passed", "failed", "skipped"], said
    assert "record a pack for this bundle" in found["pack"]["says"]
    assert "the pack cannot be used" in found["prefill"]["says"]
    shutil.copy(packs.bundle("ascend") / "decode-128.mindir", bundle / "decode-128.mindir")
    status, _, found = climb(bundle, tmp_path / "r.json", "--rungs", "files", "--only", "decode")
    assert status == 1 and "decode-128.mindir has" in found["files"]["says"]


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("import os; os.abort()", "the process ended with signal 6"),
        ("import time; time.sleep(60)", "no answer within 2 s; the process was ended"),
        ("raise RuntimeError('---- \\n- Device load:\\nno device')", "RuntimeError: no device"),
    ],
)
def test_a_crash_a_hang_and_a_refusal_end_one_rung_and_are_told(tmp_path, what, says):
    """With a MindSpore that does just that."""
    (tmp_path / "mindspore.py").write_text(what)
    arguments = ("--rungs", "environment,import,device", "--timeout", "2")
    status, said, found = climb(
        packs.bundle("cpu"), tmp_path / "r.json", *arguments, PYTHONPATH=str(tmp_path)
    )
    assert status == 1 and "FAILED: import, device" in said
    assert found["environment"]["status"] == "passed"
    assert says in found["import"]["says"] and says in found["device"]["says"]


def test_wrong_input_is_told_and_nothing_runs(tmp_path):
    bundle = packs.bundle("cpu")
    for arguments, says in (
        (("--rungs", "nothing"), "there is no rung 'nothing'; choose from environment,"),
        (("--pack", tmp_path / "none.npz"), "is no file; verify-parity record writes one"),
        (("--bundle", tmp_path), "is no manifest of a bundle"),
    ):
        status, said, _ = climb(bundle, tmp_path / "r.json", *arguments)
        assert status == 2 and says in said
    assert not (tmp_path / "r.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["cpu", "ascend"])
def test_the_whole_ladder(target, tmp_path):
    """On a CPU: for its own bundle everything that makes sense; for a device's all that needs no kernel of it."""
    status, said, found = climb(packs.bundle(target), tmp_path / "r.json", "--pack", packs.pack_file(target))
    statuses = {name: rung["status"] for name, rung in found.items()}
    assert len(statuses) == 17, said
    if target == "cpu":
        assert status == 0 and {n for n, s in statuses.items() if s != "passed"} == {"load", "capture"}, said
        assert device_report.read_report(tmp_path / "r.json")["questions"][2]["status"] == "passed"
    else:
        passed = {n for n, s in statuses.items() if s == "passed"}
        assert status == 1 and passed == {"environment", "files", "pack", "import", "device", "load"}, said
