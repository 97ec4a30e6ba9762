"""What every command has in common: quick, light, plain about mistakes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import bundles
import pytest
from golden import DATA

COMMANDS = {
    "convert-weights": "kimi_vl.convert.cli",
    "export-mindir": "kimi_vl.export.cli",
    "inspect-mindir": "kimi_vl.export.inspect",
    "verify-parity": "kimi_vl.verify.cli",
}
HEAVY = ("transformers", "torch", "mindspore")
PROBE = """
import json, sys
from {module} import main
sys.argv = ["command", *json.loads(sys.argv[1])]
status = 0
try:
    main()
except SystemExit as e:
    status = e.code or 0
print("\\nPROBE", json.dumps([status, [m for m in {heavy!r} if m in sys.modules]]))
"""


def probe(command: str, *args: str) -> tuple[int, list[str], str]:
    """Exit status, heavy modules imported, and everything printed."""
    code = PROBE.format(module=COMMANDS[command], heavy=HEAVY)
    done = subprocess.run([sys.executable, "-c", code, json.dumps(args)], capture_output=True, text=True)
    out, _, tail = done.stdout.rpartition("PROBE ")
    status, heavy = json.loads(tail)
    return status, heavy, out + done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_no_framework(command):
    status, heavy, text = probe(command, "--help")
    assert status == 0 and heavy == []
    assert "Example" in text


def test_dry_runs_import_no_framework_but_for_what_is_traced(tmp_path):
    from kimi_vl.convert import convert, plan

    ckpt = tmp_path / "ckpt"
    src = str(DATA / "tiny8-bf16")
    status, heavy, text = probe("convert-weights", "--src", src, "--dst", str(ckpt), "--dry-run")
    assert (status, heavy) == (0, []) and not ckpt.exists(), text
    convert(plan(src, ckpt))
    bundle = tmp_path / "mindir"
    args = ("--src", str(ckpt), "--seq", "512", "--target", "cpu", "--dst", str(bundle), "--dry-run")
    status, heavy, text = probe("export-mindir", *args)
    assert (status, heavy) == (0, ["mindspore"]) and not bundle.exists(), text
    report = tmp_path / "report"
    args = ("--reference", src, "--candidate", str(ckpt), "--report", str(report), "--dry-run")
    status, heavy, text = probe("verify-parity", *args)
    assert (status, heavy) == (0, []) and not report.exists(), text


def test_inspecting_a_bundle_imports_no_framework():
    status, heavy, text = probe("inspect-mindir", str(bundles.bundle("tiny8-fp32")))
    assert (status, heavy) == (0, []) and "FLOPs" in text


@pytest.mark.parametrize(
    ("command", "args"),
    [
        ("convert-weights", ("--src", "no/such/place", "--dst", "out")),
        ("export-mindir", ("--src", "no/such/place", "--seq", "512", "--dst", "out")),
        (
            "verify-parity",
            ("--reference", "no/such/place", "--candidate", "no/such/place", "--report", "out"),
        ),
        ("inspect-mindir", ("no/such/place",)),
        ("convert-weights", ("--no-such-option",)),
    ],
)
def test_mistakes_get_one_sentence_and_status_2(command, args, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, _, text = probe(command, *args)
    assert status == 2
    assert "Traceback" not in text
    assert list(tmp_path.iterdir()) == []


def test_the_face_is_light():
    code = f"import sys, kimi_vl; kimi_vl.nano_path(); print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_no_machine_path_is_written_down():
    root = Path(__file__).parents[1]
    done = subprocess.run(
        ["git", "grep", "-nE", r"(^|[^.\w])/(work|tmp|root|home)/", "--", ".", ":!tests/test_commands.py"],
        cwd=root, capture_output=True, text=True,
    )  # fmt: skip
    if done.returncode == 128:
        pytest.skip("not a git checkout")
    assert done.stdout == ""


def test_generate_says_in_one_sentence_that_there_is_no_device():
    script = Path(__file__).parent.parent / "scripts" / "generate.py"
    command = [sys.executable, str(script), "--device", "Ascend", "--prompt", "Hello!"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3 and done.stdout == ""
    said = [line for line in done.stderr.splitlines() if line.startswith("generate: ")]
    assert len(said) == 1 and "has no Ascend support" in said[0] and "Traceback" not in done.stderr
