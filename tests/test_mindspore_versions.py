"""A bundle written under the oldest supported MindSpore computes the same under the newest, and the other way round."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kimi_vl import nano_path

ROOT = Path(__file__).parents[1]
# As scripts/test and scripts/test --oldest make them.
ENVIRONMENTS = {"newest": ROOT / ".venv", "oldest": ROOT / ".venv-oldest"}
SIZES = ("--seq", "256", "--prefill-chunk", "64", "--image-patches", "128", "--target", "cpu", "--taps")
CASES = ("--cases", "text", "--cases", "image", "--cases", "steps")

pytestmark = pytest.mark.slow


def run(age: str, command: str, *arguments: Any) -> str:
    """What a command of one of the environments prints."""
    done = subprocess.run(
        [ENVIRONMENTS[age] / "bin" / command, *map(str, arguments)],
        env={**os.environ, "GLOG_v": "3"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module", autouse=True)
def both_environments() -> None:
    for age, command in (
        ("newest", "scripts/test --setup-only"),
        ("oldest", "scripts/test --oldest --setup-only"),
    ):
        if not (ENVIRONMENTS[age] / ".installed").is_file():
            pytest.skip(f"there is no {ENVIRONMENTS[age].name}/ with the {age} MindSpore; {command} makes it")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("versions") / "ckpt"
    run("newest", "convert-weights", "--src", "nano", "--dst", path)
    return path


@pytest.mark.parametrize(("writer", "reader"), [("oldest", "newest"), ("newest", "oldest")])
def test_a_bundle_of_one_passes_and_answers_under_the_other(writer: str, reader: str, ckpt: Path) -> None:
    bundle, report = ckpt.parent / f"mindir-{writer}", ckpt.parent / f"report-{writer}"
    run(writer, "export-mindir", "--src", ckpt, *SIZES, "--dst", bundle)
    written = json.loads((bundle / "bundle.json").read_text())["mindspore"]
    run(reader, "verify-parity", "--reference", "nano", "--candidate", bundle, *CASES, "--report", report)
    read = json.loads((report / "run.json").read_text())["environment"]["mindspore"]
    assert written != read
    question = ("--image", Path(nano_path()) / "demo.png", "--prompt", "Describe the picture.")
    answers = {
        age: run(age, "python", ROOT / "scripts" / "generate.py", "--model", bundle, *question)
        for age in (writer, reader)
    }
    assert answers[writer] == answers[reader] and "yellow circle" in answers[reader]
