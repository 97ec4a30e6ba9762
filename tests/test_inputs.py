"""What a candidate's own processor makes of the suite's prompts and pictures, judged at the tap `inputs`."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import parity
import pytest
from PIL import Image

import kimi_vl
from kimi_vl.modeling.configuration import ModelConfig
from kimi_vl.verify.cases import CaseError, Limits, SeededSource, build, suite
from kimi_vl.verify.inputs import PlainPictures, compared_inputs, own_source
from kimi_vl.verify.judge import judge, load_profile
from kimi_vl.verify.oracle import build_oracle
from kimi_vl.verify.prompts import ProcessorSource
from kimi_vl.verify.runner import run_suite

NANO = Path(kimi_vl.nano_path())
CONFIG = ModelConfig.from_file(NANO)
LIMITS = Limits((256,), 64, 256)
PLANS = {plan.name: plan for plan in suite(CONFIG, LIMITS)}
REFERENCE = ProcessorSource(NANO, CONFIG)


@pytest.fixture
def files(tmp_path):
    """Nano's processor, to be changed."""
    for name in ("config.json", "preprocessor_config.json", "tokenizer_config.json", "tiktoken.model"):
        shutil.copyfile(NANO / name, tmp_path / name)
    return tmp_path


def own(directory):
    return ProcessorSource(directory, CONFIG, own_pictures=True)


def edit(path, change):
    values = json.loads(path.read_text(encoding="utf-8"))
    change(values)
    path.write_text(json.dumps(values), encoding="utf-8")


@pytest.mark.parametrize("name", ["text", "images", "batch", "chunks", "perplexity"])
def test_the_same_files_make_the_same_inputs(name):
    """Pixels by two formulations: the image processor's, and that of the reference's source."""
    case = build(PLANS[name], REFERENCE)
    found = compared_inputs(PLANS[name], case, own(NANO))
    assert found["wrong"] == 0 and found["raised"] is None
    assert found["places"] == case.inputs["input_ids"].size + len(case.inputs.get("pixel_values", ()))


def test_another_scale_of_pixels_is_wrong_in_every_patch(files):
    edit(files / "preprocessor_config.json", lambda c: c.update(image_std=[0.501] * 3))
    case = build(PLANS["images"], REFERENCE)
    found = compared_inputs(PLANS["images"], case, own(files))
    assert found["patches_wrong"] == len(case.inputs["pixel_values"]) and found["tokens_wrong"] == 0


def test_another_chat_format_is_wrong_where_its_tokens_are(files):
    def named(config):
        config["chat_template"] = config["chat_template"].replace("You are", "You were")

    edit(files / "tokenizer_config.json", named)
    found = compared_inputs(PLANS["text"], build(PLANS["text"], REFERENCE), own(files))
    assert found["patches_wrong"] == 0 and found["tokens_wrong"] > 0


def test_a_processor_that_refuses_is_wrong_everywhere(files):
    def without(config):
        config["chat_template"] = "{{ raise_exception('no template') }}"

    edit(files / "tokenizer_config.json", without)
    found = compared_inputs(PLANS["image"], build(PLANS["image"], REFERENCE), own(files))
    assert found["wrong"] == found["places"] > 0 and "no template" in found["raised"]


def test_the_case_that_grows_is_compared_at_the_length_it_has():
    plan = PLANS["experts"]
    grown = replace(plan, rows=(replace(plan.rows[0], tokens=90),))
    found = compared_inputs(plan, build(grown, REFERENCE), own(NANO))
    assert (found["places"], found["wrong"]) == (90, 0)


def test_only_sides_that_both_have_a_processor_are_compared():
    with_one = SimpleNamespace(name="ckpt", own_source=lambda: own(NANO))
    without = SimpleNamespace(name="ckpt", own_source=lambda: None)
    assert own_source(with_one, REFERENCE) is not None
    assert own_source(with_one, SeededSource(CONFIG)) is None
    assert own_source(SimpleNamespace(), REFERENCE) is None
    with pytest.raises(CaseError, match="ckpt has no tokenizer files, the reference has"):
        own_source(without, REFERENCE)


def test_pictures_that_need_padding_are_refused():
    with pytest.raises(CaseError, match=r"\(42, 28\) pixels is not of whole blocks"):
        PlainPictures(NANO, CONFIG)([Image.new("RGB", (42, 28))])


def test_pixels_are_those_of_the_picture():
    """Row-major patches, channels first, 0 to 255 as -1 to 1."""
    colours = np.random.default_rng(0).integers(0, 256, (28, 56, 3)).astype(np.uint8)
    made = PlainPictures(NANO, CONFIG)([Image.fromarray(colours)])
    assert made["image_grid_hws"].tolist() == [[2, 4]] and made["pixel_values"].shape == (8, 3, 14, 14)
    patch, channel, row, column = 6, 1, 3, 5  # the third patch of the second row
    assert made["pixel_values"][patch, channel, row, column] == np.float32(
        colours[14 + row, 28 + column, channel] / 127.5 - 1
    )


def test_a_run_judges_the_tap_and_fails_by_it(files):
    oracle = build_oracle(NANO)
    edit(files / "preprocessor_config.json", lambda c: c.update(image_mean=[0.4] * 3))

    class Candidate(parity.OracleCandidate):
        def own_source(self):
            return self.source

    verdicts = []
    for directory in (NANO, files):
        candidate = Candidate(oracle)
        candidate.source = own(directory)
        link = run_suite(oracle, candidate, [PLANS["image"]], REFERENCE, 1)
        verdicts.append(judge(link, load_profile("strict")))
    right, wrong = verdicts
    assert right.passed and any(f.tap == "inputs" for f in right.findings)
    assert [(f.tap, f.metric) for f in wrong.failures] == [("inputs", "wrong")]
