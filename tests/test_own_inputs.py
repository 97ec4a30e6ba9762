"""A user's own prompts and pictures as cases (--inputs)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import parity
import pytest
from click.testing import CliRunner
from golden import DATA
from parity import OracleCandidate
from PIL import Image

from kimi_vl import nano_path
from kimi_vl.modeling.configuration import ModelConfig
from kimi_vl.modeling.processing import KimiVLProcessor
from kimi_vl.verify import candidates
from kimi_vl.verify.cases import CaseError, Limits, build, fitted, select, suite
from kimi_vl.verify.cli import cli
from kimi_vl.verify.oracle import build_oracle
from kimi_vl.verify.own_inputs import OwnSource, read_inputs
from kimi_vl.verify.prompts import ProcessorSource

NANO = Path(nano_path())
CONFIG = ModelConfig.from_file(NANO)
LIMITS = Limits(contexts=(128, 256), chunk=64, patches=256)
PLANS = suite(CONFIG, LIMITS)


def picture(path: Path, width: int = 40, height: int = 30) -> None:
    pixels = np.random.default_rng(width * height).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(path)


@pytest.fixture
def mine(tmp_path):
    """A question, one with a picture, one with two, and a conversation with a picture in both turns."""
    directory = tmp_path / "mine"
    directory.mkdir()
    (directory / "plain.txt").write_text("What is 2 + 2?\n")
    (directory / "one.txt").write_text("What shape is it?")
    picture(directory / "one.png")
    (directory / "two shapes.txt").write_text("Are they alike?")
    picture(directory / "two shapes-1.jpg", 60, 30)
    picture(directory / "two shapes-2.webp", 30, 60)
    (directory / "talk.json").write_text(
        json.dumps(
            [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}],
                },
                {"role": "assistant", "content": "A square."},
                {"role": "user", "content": [{"type": "image", "image": "one.png"}]},
            ]
        )
    )
    picture(directory / "a.png", 56, 28)
    (directory / ".hidden.png").write_text("")
    (directory / "README.md").write_text("of no matter")
    return directory


def made(directory, limits=LIMITS):
    own = read_inputs(directory, NANO)
    source = OwnSource(ProcessorSource(NANO, CONFIG), own, NANO)
    return {plan.name: (fitted(plan, source, 1, CONFIG, limits), source) for plan in own.plans}


def test_a_prompt_is_what_the_processor_makes_of_it_with_its_pictures_before_it(mine):
    plan, source = made(mine)["two shapes"]
    case = build(plan, source)
    assert case.prompts[0].index("<|media_pad|>") < case.prompts[0].index("Are they alike?<|im_end|>")
    pictures = [str(mine / f"two shapes-{n}") for n in ("1.jpg", "2.webp")]
    again = KimiVLProcessor.from_pretrained(NANO)(text=case.prompts[0], images=pictures, return_tensors="np")
    assert all(np.array_equal(case.inputs[name], again[name]) for name in again)
    assert case.inputs["image_grid_hws"].tolist() == [[4, 6], [6, 4]]
    assert case.new_tokens == 32 and case.what == "own prompt two shapes.txt, 2 pictures"
    assert build(*made(mine)["plain"]).prompts[0].count("What is 2 + 2?<|im_end|>") == 1


def test_a_conversation_is_taken_as_it_is(mine):
    case = build(*made(mine)["talk"])
    assert case.prompts[0].startswith("<|im_system|>system<|im_middle|>Be brief.<|im_end|>")
    assert case.inputs["image_grid_hws"].tolist() == [[2, 4], [4, 4]]
    assert case.what == "own conversation talk.json, 4 messages, 2 pictures"


def test_pictures_are_scaled_as_the_reference_does(mine):
    picture(mine / "one.png", 1400, 1400)
    plan, source = made(mine, Limits(contexts=(1024,), patches=1408))["one"]
    assert not plan.impossible
    assert build(plan, source).inputs["image_grid_hws"].prod() <= 34 * 34  # in_token_limit is 1024


def test_all_are_cases_beside_the_suites_and_can_be_chosen(mine):
    plans = [*PLANS, *read_inputs(mine, NANO).plans]
    assert [p.name for p in select(plans)][-4:] == ["one", "plain", "talk", "two shapes"]
    assert [p.name for p in select(plans, ["inputs"])] == ["one", "plain", "talk", "two shapes"]
    assert [p.name for p in select(plans, ["talk", "text"])] == ["text", "talk"]
    with pytest.raises(CaseError, match="inputs are the cases of --inputs DIR, which is not given"):
        select(PLANS, ["inputs"])


def test_what_the_candidate_cannot_take_says_why(mine):
    (mine / "long.txt").write_text("tell me more " * 200)
    (mine / "near.txt").write_text("x1 " * 70)
    picture(mine / "one.png", 360, 360)
    plans = {name: plan for name, (plan, _) in made(mine).items()}
    assert plans["long"].impossible.endswith("there is 256")
    assert plans["one"].impossible == "needs 676 patches a picture, there are 256"
    length = build(*made(mine)["near"]).inputs["input_ids"].shape[1]
    assert (
        256 - 32 < length <= 256 and plans["near"].new_tokens == 256 - length and not plans["near"].impossible
    )


def put(name, content=""):
    return lambda d: (
        (d / name).write_bytes(content) if isinstance(content, bytes) else (d / name).write_text(content)
    )


def talk(*messages):
    return put("bad.json", json.dumps(list(messages)))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            put("text.txt", "?"),
            "text.txt: 'text' is the name of a case or group of the suite; rename the file",
        ),
        (put("quick.txt", "?"), "'quick' is the name of a case or group"),
        (put("talk.txt", "?"), "talk.txt: there is talk.json too"),
        (put("empty.txt", " \n"), "empty.txt: is empty; write the prompt into it"),
        (put("latin.txt", b"na\xefve"), "latin.txt: is not UTF-8 text"),
        (put("one.jpg"), "one.png: there is one.jpg too; number them one-1, one-2"),
        (put("two shapes-4.png"), "there is a picture two shapes-4, but no two shapes-3; number them from 1"),
        (put("qlain.png"), "qlain.png: belongs to no prompt; call it after one"),
        (put("bad.json", "["), "bad.json: is not valid JSON"),
        (put("bad.json", "{}"), "bad.json: holds no list of messages"),
        (talk({"content": "?"}), "bad.json: message 1 is no"),
        (talk({"role": "user", "content": [{"type": "video"}]}), "message 1 has content other than text"),
        (talk({"role": "user"}), "message 1 has content other than text"),
        (
            talk({"role": "user", "content": [{"type": "image", "image": "gone.png"}]}),
            "bad.json: names the picture 'gone.png', which is not in ",
        ),
        (
            talk({"role": "user", "content": [{"type": "image", "image": "../x.png"}]}),
            "names the picture '../x.png'; expected the name of a file beside it",
        ),
        (put("one.png", "no picture"), "one.png: is not an image file that Pillow knows"),
        (put("odd.txt", "<|media_pad|>"), "odd.txt: the text has 1 image placeholders"),
    ],
)
def test_what_is_wrong_with_a_file_is_one_sentence(mine, change, says):
    change(mine)
    with pytest.raises(CaseError) as raised:
        made(mine)
    assert says in str(raised.value) and "\n" not in str(raised.value)


def test_a_directory_without_prompts_and_a_reference_without_a_processor_are_refused(mine, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(CaseError, match="empty holds neither a NAME.txt nor a NAME.json"):
        read_inputs(tmp_path / "empty", NANO)
    with pytest.raises(CaseError, match="absent is not a directory"):
        read_inputs(tmp_path / "absent", NANO)
    with pytest.raises(CaseError, match="tiny8-bf16 has no processor"):
        read_inputs(mine, DATA / "tiny8-bf16")


def test_the_command_runs_them_and_records_their_hashes(mine, tmp_path, monkeypatch):
    fake = OracleCandidate(build_oracle(NANO))
    monkeypatch.setattr(candidates, "open_candidate", lambda found: fake)
    (mine / "long.txt").write_text("tell me more " * 200)
    both = ["--reference", "nano", "--candidate", "nano", "--inputs", str(mine), "--cases", "inputs"]
    dry = CliRunner().invoke(cli, [*both, "--dry-run"])
    assert dry.exit_code == 0 and f"and 5 of {mine}" in dry.stdout
    result = CliRunner().invoke(cli, [*both, "--report", str(tmp_path / "r")])
    assert result.exit_code == 0, result.output
    assert "note: case long did not run: needs a context of" in result.stdout
    (run,) = parity.valid(tmp_path / "r" / "run.json")["links"]
    assert [case["name"] for case in run["cases"]] == ["one", "plain", "talk", "two shapes"]
    assert all(case["taps"]["greedy"]["steps"] == 32 for case in run["cases"])
    files = run["suite"]["inputs_dir"]
    assert sorted(files) == sorted(p.name for p in mine.iterdir() if p.suffix != ".md" and p.name[0] != ".")
    assert files["a.png"]["sha256"] == hashlib.sha256((mine / "a.png").read_bytes()).hexdigest()
    assert str(mine) not in (tmp_path / "r" / "run.json").read_text()
    page = (tmp_path / "r" / "report.html").read_text()
    assert "own prompt two shapes.txt, 2 pictures" in page
