"""The reference by code that a checkpoint brings (--reference-code remote)."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys

import numpy as np
import parity
import pytest
from click.testing import CliRunner
from golden import DATA
from parity import LIMITS, OracleCandidate, oracle

from kimi_vl.convert.errors import EnvironmentProblem
from kimi_vl.verify import candidates
from kimi_vl.verify.cases import SeededSource, build, suite
from kimi_vl.verify.cli import cli
from kimi_vl.verify.remote import RemoteCodeError, RemoteOracle

CODE = DATA / "remote"
BATCH = next(plan for plan in suite(oracle().config, LIMITS) if plan.name == "batch")  # three pictures


@pytest.fixture
def checkpoint(tmp_path):
    """The tiny checkpoint with a stand-in for the publisher's code."""
    directory = tmp_path / "model"
    shutil.copytree(DATA / "tiny8-bf16", directory, copy_function=shutil.copyfile)
    shutil.copytree(
        CODE, directory, dirs_exist_ok=True, copy_function=shutil.copyfile, ignore=lambda *_: ["__pycache__"]
    )
    name(directory, "modeling_kimi_vl.KimiVLForConditionalGeneration")
    return directory


def name(directory, reference):
    config = json.loads((directory / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": reference}
    (directory / "config.json").write_text(json.dumps(config))


def change(directory, old, new):
    path = directory / "modeling_kimi_vl.py"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_the_code_of_a_checkpoint_gives_what_our_reference_gives(checkpoint):
    """Tuples, lists and two values instead of three are understood; what the code prints disturbs nobody."""
    case = build(BATCH, SeededSource(oracle().config), 1)
    remote = RemoteOracle(checkpoint)
    ours, theirs = oracle().run(case.inputs), remote.run(case.inputs)
    assert theirs.keys() == ours.keys()
    for tap, value in ours.items():
        assert theirs[tap].shape == value.shape and theirs[tap].dtype == value.dtype, tap
        assert np.allclose(theirs[tap], value, atol=1e-6), tap
    a, b = oracle().greedy(case.inputs, 4), remote.greedy(case.inputs, 4)
    assert np.array_equal(a.tokens, b.tokens) and np.allclose(a.margins, b.margins, atol=1e-5)
    remote.close()


def test_a_report_names_the_class_and_the_hashes_of_the_code(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(candidates, "open_candidate", lambda found: OracleCandidate(oracle()))
    both = [
        "--reference",
        str(checkpoint),
        "--candidate",
        str(DATA / "tiny8-bf16"),
        "--reference-code",
        "remote",
    ]
    result = CliRunner().invoke(cli, [*both, "--report", str(tmp_path / "r"), "--cases", "image"])
    assert result.exit_code == 0, result.output
    assert "warning: --reference-code remote executes modeling_kimi_vl.py" in result.stderr
    assert "by KimiVLForConditionalGeneration of the checkpoint's modeling_kimi_vl.py" in result.stdout
    reference = parity.valid(tmp_path / "r" / "run.json")["reference"]
    assert reference["class"] == "KimiVLForConditionalGeneration of the checkpoint's modeling_kimi_vl.py"
    for file in CODE.glob("*.py"):
        assert reference["files"][file.name]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert "model-00001-of-00003.safetensors" in reference["files"]
    refused = CliRunner().invoke(cli, [*both, "--dry-run", "--arithmetic", "rounded"])
    assert refused.exit_code == 2


INSTALL = "it was written for transformers 4.48 to 4.50: python -m venv old"


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("import PreTrainedModel", "import PreTrainedModel, gone", r"ImportError with transformers \d+\.\S+: cannot import name 'gone'"),
        ('"missing_keys": []', '"missing_keys": ["a", "b"]', "missing keys in the weights: a and 1 more"),
        ("import torch\n", "import os\nos._exit(7)\n", "its process ended with status 7"),
    ],
)  # fmt: skip
def test_code_that_does_not_run_says_what_to_install(checkpoint, old, new, says):
    change(checkpoint, old, new)
    with pytest.raises(EnvironmentProblem, match=says) as raised:
        RemoteOracle(checkpoint)
    assert INSTALL in str(raised.value) and "\n" not in str(raised.value)


def test_code_that_breaks_when_it_is_called_says_so_and_ends_with_3(checkpoint, tmp_path, monkeypatch):
    change(checkpoint, "assert x.ndim == 3", "raise AttributeError('no get_usable_length')")
    monkeypatch.setattr(candidates, "open_candidate", lambda found: OracleCandidate(oracle()))
    both = [
        "--reference",
        str(checkpoint),
        "--candidate",
        str(DATA / "tiny8-bf16"),
        "--reference-code",
        "remote",
    ]
    result = CliRunner().invoke(cli, [*both, "--report", str(tmp_path / "r"), "--cases", "text"])
    assert result.exit_code == 3
    last = result.stderr.splitlines()[-1]
    assert "modeling_kimi_vl.py does not run (AttributeError with transformers" in last and INSTALL in last


def test_a_python_that_is_none_and_one_without_torch(checkpoint):
    with pytest.raises(EnvironmentProblem, match="--reference-python: absent cannot be run"):
        RemoteOracle(checkpoint, "absent")
    with pytest.raises(EnvironmentProblem, match="does not run"):
        RemoteOracle(checkpoint, "true")


def test_a_checkpoint_without_code_is_refused_and_nothing_is_executed(checkpoint, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("something was started"))
    with pytest.raises(RemoteCodeError, match="brings no code, its config.json names no file in auto_map"):
        RemoteOracle(DATA / "tiny8-bf16")
    (checkpoint / "modeling_kimi_vl.py").unlink()
    with pytest.raises(RemoteCodeError, match="lacks modeling_kimi_vl.py, which its config.json names"):
        RemoteOracle(checkpoint)
    name(checkpoint, "somebody/else--modeling_kimi_vl.KimiVLForConditionalGeneration")
    with pytest.raises(RemoteCodeError, match="brings no code"):
        RemoteOracle(checkpoint)


def test_without_the_option_no_code_of_a_checkpoint_runs(checkpoint, tmp_path, monkeypatch):
    change(checkpoint, "import torch\n", f"open({str(tmp_path / 'ran')!r}, 'w')\nimport torch\n")
    monkeypatch.setattr(candidates, "open_candidate", lambda found: OracleCandidate(oracle()))
    both = [
        "--reference",
        str(checkpoint),
        "--candidate",
        str(DATA / "tiny8-bf16"),
        "--report",
        str(tmp_path / "r"),
    ]
    assert CliRunner().invoke(cli, [*both, "--cases", "text"]).exit_code == 0
    assert not (tmp_path / "ran").exists()
    wrong = CliRunner().invoke(cli, [*both, "--reference-python", sys.executable])
    assert wrong.exit_code == 2 and "has no place without --reference-code remote" in wrong.stderr
