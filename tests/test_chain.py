"""Several candidates in one run: the chain's order, what is shared, and going on after a run was killed."""

from __future__ import annotations

import json

import bundles
import parity
import pytest
from click.testing import CliRunner
from golden import DATA
from parity import OracleCandidate

from kimi_vl.modeling.kernels import library
from kimi_vl.verify import candidates
from kimi_vl.verify.chain import find_links
from kimi_vl.verify.cli import cli
from kimi_vl.verify.runs import load_run

pytestmark = pytest.mark.usefixtures("one_torch_thread")
TINY = DATA / "tiny8-bf16"


def invoke(*arguments):
    return CliRunner().invoke(cli, [str(a) for a in arguments])


def test_one_run_holds_every_stage_and_all_run_the_same_inputs(tmp_path):
    bundle, ckpt = bundles.bundle("tiny8-bf16"), bundles.converted("tiny8-bf16")
    arguments = ("--reference", TINY, "--candidate", bundle, "--candidate", ckpt, "--report", tmp_path)
    result = invoke(*arguments, "--cases", "steps")
    assert result.exit_code == 0, result.output
    run = parity.valid(tmp_path / "run.json")
    network, reloaded = run["links"]  # in the order of the chain, whatever the order of the options
    assert (network["candidate"]["stage"], reloaded["candidate"]["stage"]) == ("network", "bundle")
    assert network["candidate"]["context"] == reloaded["candidate"]["context"] == 256
    assert network["cases"][0]["inputs_sha256"] == reloaded["cases"][0]["inputs_sha256"]
    for link in run["links"]:
        assert link["weights"]["parameters"] == 76 and link["weights"]["different"] == []
        assert 0 < link["cases"][0]["noise"]["logits"] < 1e-5
    for stage in ("MindSpore graphs: MindSpore", "Reloaded CPU MindIR: MindSpore"):
        line = next(line for line in result.stdout.splitlines() if line.startswith(f"  {stage}"))
        assert line.endswith("  ok")
    html = (tmp_path / "report.html").read_text()
    assert "Cases: MindSpore graphs" in html and "Torch itself, other kernels" in html
    assert not (tmp_path / ".unfinished").exists()


def test_what_is_rounded_runs_in_fp32_too(tmp_path):
    other = bundles.copy("tiny8-bf16", tmp_path / "mindir", operators=False)
    bundles.edit(other, lambda manifest: manifest.update(target="ascend", parameter_dtype=None))
    found = [("interpreter", other)]
    if library.available() and library.can_round():
        found.append(("bundle", bundles.bundle("tiny8-bf16")))  # by MindSpore, on operators that round
    for stage, directory in found:
        links = find_links([("b", directory)], None, "rounded", ("text",))
        assert [(link.found.stage, link.found.arithmetic) for link in links] == [
            (stage, "lifted"),
            (stage, "rounded"),
        ]


# ---- going on -------------------------------------------------------------------------------------------------------


class Counted(OracleCandidate):
    """Remembers its cases by their tokens, and is killed in one of them."""

    asked: list[int] = []
    killed_at: int | None = None

    def run(self, inputs, calls):
        if len(Counted.asked) == Counted.killed_at:
            raise KeyboardInterrupt
        Counted.asked.append(inputs["input_ids"].size)
        return super().run(inputs, calls)


@pytest.fixture
def verify(monkeypatch, tmp_path):
    """`verify-parity` of three cases, killed in the case of this number; its status and how many cases were run."""
    monkeypatch.setattr(candidates, "open_candidate", lambda found: Counted(parity.oracle()))
    cases = ("--cases", "text", "--cases", "image", "--cases", "steps")

    def run(killed_at=None, seed=1, report=tmp_path / "r"):
        Counted.asked, Counted.killed_at = [], killed_at
        arguments = ("--reference", TINY, "--candidate", TINY, "--report", report, "--seed", seed)
        return invoke(*arguments, *cases), len(Counted.asked)

    return run


def test_a_killed_run_goes_on_and_ends_as_one_that_was_not(verify, tmp_path):
    killed, done = verify(killed_at=2)
    assert (killed.exit_code, done) == (130, 2)
    again, done = verify()
    assert again.exit_code == 0 and done == 1
    assert "going on with an unfinished run of the same: 2 cases are done" in again.stderr
    whole, done = verify(report=tmp_path / "other")
    assert whole.exit_code == 0 and done == 3
    one, other = (load_run(tmp_path / name / "run.json") for name in ("r", "other"))
    one.pop("header"), other.pop("header")
    assert one == other


def test_another_run_does_not_go_on_with_it(verify):
    verify(killed_at=2)
    other, done = verify(seed=2)
    assert other.exit_code == 0 and done == 3 and "going on" not in other.stderr


def test_a_damaged_case_is_run_again(verify, tmp_path):
    verify(killed_at=2)
    first, second = sorted((tmp_path / "r" / ".unfinished").glob("case-*.json"))
    first.write_text(first.read_text()[:-40])
    changed = json.loads(second.read_text())
    changed["record"]["case"]["taps"]["logits"]["rel_l2"] = 0.5
    second.write_text(json.dumps(changed))
    again, done = verify()
    assert again.exit_code == 0 and done == 3
