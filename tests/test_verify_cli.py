"""The command verify-parity."""

from __future__ import annotations

import importlib.util
import json
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import bundles
import parity
import pytest
from click.testing import CliRunner
from golden import DATA
from parity import OracleCandidate

from kimi_vl import nano_path
from kimi_vl.convert import source
from kimi_vl.verify import candidates
from kimi_vl.verify.cli import cli
from kimi_vl.verify.oracle import build_oracle

TINY = str(DATA / "tiny8-bf16")
HEAVY = ("torch", "transformers", "mindspore", "matplotlib", "jinja2")


def invoke(*arguments):
    return CliRunner().invoke(cli, list(map(str, arguments)), prog_name="verify-parity")


@pytest.fixture(scope="module")
def oracle():
    return build_oracle(TINY)


@pytest.fixture
def candidate_is(monkeypatch, oracle):
    """Puts a candidate made from the oracle in the place of what is loaded from a directory."""

    def put(**how):
        fake = OracleCandidate(oracle, **how)
        monkeypatch.setattr(candidates, "open_candidate", lambda found: fake)

    return put


def test_the_network_passes(tmp_path, monkeypatch):
    """The real thing, once: MindSpore graphs against Torch. One cache length: fewer graphs to compile."""
    monkeypatch.setattr(candidates, "CONTEXT", 256)
    monkeypatch.setattr(candidates, "CHUNK", 64)
    result = invoke("--reference", TINY, "--candidate", TINY, "--report", tmp_path, "--cases", "pieces")
    assert result.exit_code == 0, result.output
    assert "PASSED" in result.stdout and "MindSpore graphs: MindSpore" in result.stdout
    run = parity.valid(tmp_path / "run.json")
    case = run["links"][0]["cases"][0]
    assert case["taps"]["logits"]["rel_l2"] < 1e-5 and case["missing"] == []
    assert set(case["taps"]) >= {"inputs_embeds", "layers.0", "router.1", "layers.1", "layers.2", "logits"}
    assert re.fullmatch(
        r"MindSpore \S+ on CPU(, C\+\+ operators \(\w+\), fp32)?", run["links"][0]["candidate"]["runs_on"]
    )
    assert run["environment"]["mindspore"]
    assert run["reference"]["stored"] == "bfloat16"


def test_a_bundle_passes(tmp_path):
    """Reloaded MindIR against Torch: a picture, single steps, the cache filled to its last slot."""
    bundle = bundles.bundle("tiny8-bf16")
    arguments = ("--reference", TINY, "--candidate", bundle, "--report", tmp_path)
    result = invoke(*arguments, "--cases", "image", "--cases", "steps", "--cases", "edge")
    assert result.exit_code == 0, result.output
    assert "Reloaded CPU MindIR: MindSpore" in result.stdout
    assert "MindSpore graphs: did not run" in result.stdout
    run = parity.valid(tmp_path / "run.json")
    assert [case["missing"] for case in run["links"][0]["cases"]] == [[], [], []]
    assert all(case["taps"]["tapped_logits"]["max_abs"] == 0 for case in run["links"][0]["cases"])
    assert (
        run["links"][0]["candidate"]["kind"] == "bundle"
        and "bundle.json" in run["links"][0]["candidate"]["files"]
    )


def test_a_bundle_passes_in_the_interpreter(tmp_path):
    bundle = bundles.bundle("tiny8-bf16")
    arguments = ("--reference", TINY, "--candidate", bundle, "--report", tmp_path, "--through", "interpreter")
    result = invoke(*arguments, "--cases", "pieces")
    assert result.exit_code == 0, result.output
    assert "CPU MindIR, interpreted: node by node in Torch" in result.stdout
    assert "Reloaded CPU MindIR: did not run" in result.stdout
    run = parity.valid(tmp_path / "run.json")
    assert (
        run["links"][0]["cases"][0]["taps"]["logits"]["rel_l2"] < 1e-5
        and not run["links"][0]["candidate"]["on_device"]
    )


def test_a_bundle_for_a_device_is_interpreted_and_only_a_bundle_can_be(tmp_path):
    other = bundles.copy("tiny8-bf16", tmp_path / "mindir")
    bundles.edit(other, lambda manifest: manifest.update(target="ascend"))
    assert candidates.inspect(other).stage == "interpreter"
    assert candidates.inspect(other, through="mindspore").stage == "bundle"
    assert candidates.inspect(bundles.bundle("tiny8-bf16")).stage == "bundle"
    dry = ("--reference", TINY, "--dry-run")
    assert "(bundle, interpreted, lifted)" in invoke(*dry, "--candidate", other).stdout
    refused = invoke(*dry, "--candidate", TINY, "--through", "interpreter")
    assert refused.exit_code == 2 and "--through:" in refused.stderr and "is no bundle" in refused.stderr
    plain = bundles.bundle("tiny8-bf16", operators=False)
    wide = invoke(*dry, "--candidate", plain, "--arithmetic", "rounded")
    assert wide.exit_code == 2 and "cannot be rounded, MindSpore computes it in fp32" in wide.stderr
    wide = invoke(*dry, "--candidate", other, "--arithmetic", "rounded")
    assert wide.exit_code == 2 and "cannot be rounded, its graphs compute in float32" in wide.stderr


def test_a_bundle_without_taps_passes_and_says_what_was_not_judged(tmp_path):
    bundle = bundles.bundle("tiny8-fp32")
    arguments = ("--reference", DATA / "tiny8-fp32", "--candidate", bundle, "--report", tmp_path)
    result = invoke(*arguments, "--cases", "chunks")
    assert result.exit_code == 0, result.output
    assert "not judged: vision tower, input embeddings, hidden states" in result.stdout
    taps = parity.valid(tmp_path / "run.json")["links"][0]["cases"][0]["taps"]
    assert {"projector_out", "logits", "greedy"} <= set(taps) and "layers.0" not in taps


def test_a_bundle_with_a_changed_byte_is_refused_before_it_runs(tmp_path):
    broken = bundles.copy("tiny8-fp32", tmp_path / "mindir")
    shard = next(broken.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.unlink()
    shard.write_bytes(content)
    tiny = DATA / "tiny8-fp32"
    result = invoke("--reference", tiny, "--candidate", broken, "--report", tmp_path / "r")
    assert result.exit_code == 2 and shard.name in result.stderr.splitlines()[-1]


def test_all_is_well(candidate_is, tmp_path):
    candidate_is()
    result = invoke("--reference", TINY, "--candidate", TINY, "--report", tmp_path / "r")
    assert result.exit_code == 0, result.output
    assert {p.name for p in (tmp_path / "r").iterdir()} == parity.REPORT
    assert "reference: " in result.stdout and "[1/16] text" in result.stderr
    assert len(parity.valid(tmp_path / "r" / "run.json")["links"][0]["candidate"]["files"]) == 6


def test_what_is_compared_is_called_as_it_was_given(candidate_is, tmp_path, monkeypatch):
    """A path stays one; nano is nano, wherever the package is installed."""
    nano = nano_path()
    assert nano != "nano"
    put = invoke("--reference", "nano", "--candidate", "nano", "--dry-run")
    assert re.search(r"reference: nano\n +candidate: nano \(published directory\)\n", put.stdout), put.output
    assert f"reference: {nano}\n" in invoke("--reference", nano, "--candidate", nano, "--dry-run").stdout
    candidate_is()
    found = source.Source(Path(TINY), "some/repo", "abc")
    monkeypatch.setattr(source, "resolve", lambda value: found)
    result = invoke("--reference", "some/repo", "--candidate", TINY, "--report", tmp_path, "--cases", "text")
    assert result.exit_code == 0, result.output
    assert "reference: some/repo (revision abc)\n" in result.stdout
    run = json.loads((tmp_path / "run.json").read_text())
    assert (run["reference"]["path"], run["reference"]["revision"]) == ("some/repo", "abc")
    assert "<code>some/repo</code>, revision <code>abc</code>" in (tmp_path / "report.html").read_text()


def test_status_1_names_the_first_bad_layer(candidate_is, tmp_path):
    def spoil(taps, inputs, calls):
        taps["hidden_states"][1:] *= 1.001

    candidate_is(spoil=spoil)
    arguments = ("--reference", TINY, "--candidate", TINY, "--report", tmp_path, "--cases", "text")
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert "FAILED: first bad is decoder layer 1 in case text" in result.stdout
    result = invoke(*arguments, "--json")
    assert result.exit_code == 1
    verdict = json.loads(result.stdout)
    assert verdict["first_bad"]["tap"] == "layers.1" and not verdict["passed"]


def test_a_saved_run_can_be_judged_again(candidate_is, tmp_path):
    def spoil(taps, inputs, calls):
        taps["logits"] *= 1.00005

    candidate_is(spoil=spoil)
    report = tmp_path / "r"
    first = invoke("--reference", TINY, "--candidate", TINY, "--report", report, "--cases", "text")
    assert first.exit_code == 1
    again = invoke("judge", report / "run.json")
    assert again.exit_code == 1 and "FAILED: first bad is logits in case text" in again.stdout
    lax = tmp_path / "lax.json"
    gates = [{"taps": "logits", "metric": "rel_l2", "at_most": 1e-3}]
    lax.write_text(json.dumps({"name": "lax", "what": "looser", "gates": gates}))
    other = tmp_path / "other"
    easy = invoke("judge", report / "run.json", "--profile", lax, "--report", other, "--json")
    assert easy.exit_code == 0 and json.loads(easy.stdout)["profiles"] == ["lax"]
    assert {p.name for p in other.iterdir()} == parity.REPORT


def test_the_dry_run_lists_the_cases():
    result = invoke("--reference", TINY, "--candidate", TINY, "--dry-run")
    assert result.exit_code == 0
    for name in ("text", "chunks", "batch-steps", "bucket", "experts"):
        assert f"  {name} " in result.stdout
    listed = json.loads(invoke("--reference", TINY, "--candidate", TINY, "--dry-run", "--json").stdout)
    assert [c["name"] for c in listed["cases"]][:2] == ["text", "image"] and listed["profile"] == "strict"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["judge", "--help"],
        ["--reference", TINY, "--candidate", TINY, "--dry-run"],
        ["--reference", TINY],
        ["--reference", TINY, "--candidate", TINY, "--report", "r", "--cases", "nonsense"],
        ["--reference", "absent", "--candidate", TINY, "--report", "r"],
    ],
    ids=" ".join,
)
def test_answers_at_once_and_loads_nothing_heavy(arguments, tmp_path):
    code = f"""
import sys
from kimi_vl.verify.cli import main
sys.argv[1:] = {arguments!r}
try:
    main()
except SystemExit:
    pass
print([m for m in {HEAVY!r} if m in sys.modules])
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.stdout.splitlines()[-1] == "[]", done.stdout + done.stderr
    # processor time: other programs on the machine do not count
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    assert list(tmp_path.iterdir()) == []


def config_with(directory, **text):
    shutil.copytree(TINY, directory, copy_function=shutil.copyfile)
    raw = json.loads((directory / "config.json").read_text())
    raw["text_config"] |= text
    (directory / "config.json").write_text(json.dumps(raw))
    return directory


BOTH = ("--reference", TINY, "--candidate", TINY, "--report", "r")
IN_FP32 = ("--reference", DATA / "tiny8-fp32", "--candidate", DATA / "tiny8-fp32")


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "Missing option '--reference'"),
        (("--reference", TINY), "Missing option '--candidate'"),
        (("--reference", TINY, "--candidate", TINY), "Missing option '--report'"),
        (("--reference", "absent", *BOTH[2:]), "--reference absent: there is no such directory"),
        ((*BOTH[:2], "--candidate", "absent", *BOTH[4:]), "--candidate absent: there is no such directory"),
        ((*BOTH, "--profile", "strikt"), "there is no 'strikt'; give one of bf16, strict"),
        ((*BOTH, "--cases", "txt"), "there is no case 'txt'"),
        ((*BOTH, "--seed", "-1"), "--seed"),
        (
            (*IN_FP32, "--report", "r", "--arithmetic", "rounded"),
            "cannot be rounded, MindSpore computes it in fp32",
        ),
        (("judge", "absent.json"), "absent.json: cannot be read"),
        (("judge", str(DATA / "tiny8-bf16" / "config.json")), "is no run of verify-parity"),
    ],
)
def test_bad_usage_ends_with_2_and_one_line(arguments, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert says in result.stderr and "Traceback" not in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_candidate_of_another_model_is_refused(tmp_path):
    other = config_with(tmp_path / "m", rms_norm_eps=1e-6)
    result = invoke("--reference", TINY, "--candidate", other, "--report", tmp_path / "r")
    assert result.exit_code == 2
    assert "has text_config.rms_norm_eps 1e-06, the reference 1e-05" in result.stderr


def test_a_converted_directory_is_no_reference(tmp_path):
    converted = config_with(tmp_path / "m")
    (converted / "conversion.json").write_text("{}")
    result = invoke("--reference", converted, "--candidate", TINY, "--report", tmp_path / "r")
    assert result.exit_code == 2 and "is a converted directory" in result.stderr


def test_a_damaged_checkpoint_ends_with_2(tmp_path):
    damaged = config_with(tmp_path / "m")
    (damaged / "model-00002-of-00003.safetensors").unlink()
    result = invoke("--reference", damaged, "--candidate", TINY, "--report", tmp_path / "r")
    assert result.exit_code == 2
    assert "--reference model-00002-of-00003.safetensors: is not in" in result.stderr.splitlines()[-1]


@pytest.mark.parametrize("package", ["torch", "jinja2", "matplotlib"])
def test_a_missing_package_ends_with_3_and_says_how_to_get_it(package, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda n, *a: None if n == package else find(n, *a))
    result = invoke("--reference", TINY, "--candidate", TINY, "--report", tmp_path / "r")
    assert result.exit_code == 3
    assert f"{package} is not installed" in result.stderr and "pip install 'kimi-vl[verify]'" in result.stderr
    assert not (tmp_path / "r").exists()


def test_a_report_that_cannot_be_written_ends_with_3_before_the_work(tmp_path):
    (tmp_path / "file").write_text("")
    result = invoke("--reference", TINY, "--candidate", TINY, "--report", tmp_path / "file" / "r")
    assert result.exit_code == 3 and "file" in result.stderr and "loading" not in result.stderr


def test_an_interrupt_is_no_failed_parity(monkeypatch, tmp_path):
    def stop(found):
        raise KeyboardInterrupt

    monkeypatch.setattr(candidates, "open_candidate", stop)
    result = invoke("--reference", TINY, "--candidate", TINY, "--report", tmp_path, "--cases", "text")
    assert result.exit_code == 130 and "the same command goes on where it was" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == [".unfinished"]


def test_too_little_memory_ends_with_3(monkeypatch, tmp_path):
    def full(found):
        raise MemoryError

    monkeypatch.setattr(candidates, "open_candidate", full)
    result = invoke("--reference", TINY, "--candidate", TINY, "--report", tmp_path, "--cases", "text")
    assert result.exit_code == 3 and "not enough memory" in result.stderr
