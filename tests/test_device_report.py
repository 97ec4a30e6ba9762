"""A device's report as the last link of the chain: accepted where it belongs, judged by its figures, refused when damaged."""

from __future__ import annotations

import copy
import json
from xml.etree import ElementTree

import packs
import parity
import pytest
from click.testing import CliRunner
from golden import DATA
from parity import OracleCandidate

from kimi_vl.export.device import device_report
from kimi_vl.verify import candidates, device
from kimi_vl.verify.cli import cli

pytestmark = pytest.mark.usefixtures("one_torch_thread")
EXPERTS = "language_model.model.layers.1.mlp.experts.down_proj"


@pytest.fixture
def verify(monkeypatch, tmp_path):
    """`verify-parity` with a device's report; the candidate itself is the oracle."""
    monkeypatch.setattr(candidates, "open_candidate", lambda found: OracleCandidate(packs.oracle()))

    def run(report, target="ascend", pack="ascend"):
        arguments = (
            "--reference",
            packs.TINY,
            "--candidate",
            packs.bundle(target),
            "--report",
            tmp_path / "out",
        )
        more = ("--cases", "text", "--pack", packs.pack_file(pack), "--device-report", report)
        result = CliRunner().invoke(cli, list(map(str, (*arguments, *more))), prog_name="verify-parity")
        made = tmp_path / "out" / "verdict.json"
        return result, json.loads(made.read_text()) if made.is_file() else None

    return run


def test_a_device_that_computes_right_is_the_last_stage_that_ran(verify, tmp_path):
    result, verdict = verify(packs.report(tmp_path / "r.json", "ascend"))
    assert result.exit_code == 0, result.output
    assert "Ascend device: Ascend910B, MindSpore 2.10.0, report" in result.stdout
    assert verdict["stages"][-1]["ran"]
    run = tmp_path / "out" / "run.json"
    kept = parity.valid(run)["links"][0]["device"]
    assert kept["pack"] == packs.pack("ascend").digest and [c["name"] for c in kept["cases"]] == [
        "image",
        "pieces",
    ]
    assert all(case["missing"] == [] for case in kept["cases"])
    assert "<h2>Device report</h2>" in (tmp_path / "out" / "report.html").read_text()
    junit = ElementTree.parse(tmp_path / "out" / "junit.xml")
    assert junit.find(".//testsuite[@name='image on the device']/testcase") is not None
    assert junit.find(".//testcase[@name='Ascend device']/skipped") is None
    assert CliRunner().invoke(cli, ["judge", str(run)]).exit_code == 0


def test_a_report_made_on_a_cpu_is_no_device(verify, tmp_path):
    result, verdict = verify(packs.report(tmp_path / "r.json", "ascend", device="CPU"))
    assert result.exit_code == 0, result.output
    assert (
        "Ascend device: did not run: the device report was made on a CPU (MindSpore 2.10.0)" in result.stdout
    )
    assert not verdict["stages"][-1]["ran"]


def test_a_device_that_computes_wrong_fails_whatever_it_says_of_itself(verify, tmp_path):
    report = packs.report(tmp_path / "r.json", "ascend", swapped=EXPERTS)
    assert {rung["status"] for rung in device_report.read_report(report)["rungs"]} == {"passed"}
    result, verdict = verify(report)
    assert result.exit_code == 1
    assert verdict["first_bad"]["case"] == "image on the device" and verdict["first_bad"]["tap"] == "layers.1"


def test_a_report_that_leaves_something_out_fails(verify, tmp_path):
    rungs = [rung for rung in packs.rungs("ascend") if rung["name"] not in ("tokens", "files")]
    result, verdict = verify(packs.report(tmp_path / "r.json", "ascend", rungs=rungs))
    assert result.exit_code == 1
    says = {(f["tap"], f["metric"]): f["says"] for f in verdict["failures"]}
    assert "does not have it at every place" in says["greedy", "missing"]
    assert "rung files of the device's report did not pass: it did not run" in says["error", "raised"]


def test_a_rung_that_failed_is_told(verify, tmp_path):
    rungs = copy.deepcopy(packs.rungs("ascend"))
    rungs.append(
        {"name": "cache", "what": "", "status": "failed", "says": "not in place", "seconds": 0, "items": []}
    )
    result, _ = verify(packs.report(tmp_path / "r.json", "ascend", rungs=rungs))
    assert result.exit_code == 0 and "note: device, rung cache failed: not in place" in result.stdout


def test_a_report_of_another_bundle_or_pack_is_refused(verify, tmp_path):
    report = packs.report(tmp_path / "r.json", "ascend")
    result, _ = verify(report, target="cpu")
    assert result.exit_code == 2 and "record a pack for this bundle" in result.stderr
    result, _ = verify(report, target="cpu", pack="cpu")
    assert result.exit_code == 2 and "give the pack that the device had" in result.stderr
    other = packs.report(
        tmp_path / "o.json", "ascend", bundle={"manifest": "0" * 64, "target": "ascend", "dtype": "bfloat16"}
    )
    result, _ = verify(other)
    assert result.exit_code == 2 and "is of another bundle than" in result.stderr
    with pytest.raises(device.DeviceError, match="recorded against another reference"):
        device.accept(report, packs.pack_file("ascend"), packs.bundle("ascend"), DATA / "tiny8-fp32")


def test_a_damaged_report_is_refused(verify, tmp_path):
    report = packs.report(tmp_path / "r.json", "ascend")
    text = report.read_text()
    for damaged, says in (
        (text.replace("Ascend910B", "Ascend910C"), "digest"),
        (text[:-100], "not valid JSON"),
        ("{}", "is no device report"),
    ):
        report.write_text(damaged)
        result, _ = verify(report)
        assert result.exit_code == 2 and says in result.stderr
    content = device_report.read_report(packs.report(report, "ascend"))
    del content["rungs"][3]["items"][0]["item"]
    report.write_text(json.dumps(content | {"sha256": device_report.digest(content)}))
    result, _ = verify(report)
    assert result.exit_code == 2 and "lacks or misuses 'item'" in result.stderr
    rungs = copy.deepcopy(packs.rungs("ascend"))
    image = next(rung for rung in rungs if rung["name"] == "decode")["items"][0]
    image["observed"]["plain"]["logits"]["shape"] = [1, -1]
    result, _ = verify(packs.report(report, "ascend", rungs=rungs))
    assert result.exit_code == 2 and "case image has logits of shape" in result.stderr


def test_the_report_and_the_pack_are_given_together(tmp_path):
    arguments = ("--reference", packs.TINY, "--candidate", packs.TINY, "--report", tmp_path)
    result = CliRunner().invoke(cli, [*map(str, arguments), "--device-report", "r.json"])
    assert result.exit_code == 2 and "give both" in result.stderr
