"""docs/verification.md: its workflow and its recipe are the same commands, and they do what they promise."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import parity
import pytest
import yaml

TEXT = (Path(__file__).parents[1] / "docs" / "verification.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.M | re.S)


@pytest.fixture(scope="module")
def steps():
    (text,) = blocks("yaml")
    return yaml.safe_load(text)["jobs"]["parity"]["steps"]


@pytest.fixture(scope="module")
def commands(steps):
    """All but the installation, which is this environment's."""
    return [step["run"] for step in steps if "run" in step and not step["run"].startswith("pip ")]


def uploaded(steps):
    return [path for step in steps for path in step.get("with", {}).get("path", "").split()]


def test_the_workflow_runs_the_recipe(commands):
    recipe, *_ = blocks("sh")
    assert commands[:3] == recipe.splitlines()


def test_what_is_uploaded_and_described_is_what_a_report_holds(steps):
    assert {Path(path).name for path in uploaded(steps)} == {"report.html", "junit.xml"}
    assert set(re.findall(r"^\| `(\S+)` \|", TEXT, re.M)) == parity.REPORT


def test_the_schema_is_where_it_is_said_to_be():
    (code,) = blocks("python")
    names: dict = {}
    exec(code, names)
    assert names["schema"] == parity.schema().schema


@pytest.mark.slow
def test_the_workflow_passes_on_nano(steps, commands, tmp_path):
    (verify,) = (i for i, command in enumerate(commands) if command.startswith("verify-parity "))
    commands = [*commands[:verify], commands[verify] + " --cases quick", *commands[verify + 1 :]]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "GITHUB_STEP_SUMMARY": str(tmp_path / "summary.md")}
    for command in commands:
        call = ["bash", "-e", "-c", command]
        done = subprocess.run(call, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "summary.md").read_text().startswith("## Parity: PASSED\n")
    for path in uploaded(steps):
        assert (tmp_path / path).stat().st_size > 1000
    parity.valid(tmp_path / "parity" / "run.json")


@pytest.mark.slow
def test_the_chain_passes_on_a_golden_checkpoint():
    root = Path(__file__).parents[1]
    ran = subprocess.run(
        [root / "scripts" / "chain", "tests/data/tiny8-bf16"], cwd=root, capture_output=True, text=True
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    report = root / "chain-out" / "tiny8-bf16" / "report"
    run = parity.valid(report / "run.json")
    stages = [(link["candidate"]["stage"], link["candidate"].get("target")) for link in run["links"]]
    assert stages == [
        ("network", None),
        ("bundle", "cpu"),
        ("interpreter", "ascend"),
        ("interpreter", "lite"),
    ]
    assert {path.name for path in report.iterdir()} == parity.REPORT
