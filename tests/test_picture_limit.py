"""A bundle whose graphs hold less than the checkpoint's largest picture: its processor scales pictures to what they hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

import kimi_vl
from kimi_vl import KimiVLProcessor
from kimi_vl.convert import convert
from kimi_vl.export import MindIRModel, export, plan_export
from kimi_vl.export.plan import open_converted, question_room
from kimi_vl.modeling.buckets import TooLongError, fitting_limit

FILE = "preprocessor_config.json"
SIZES = {"seq": (256,), "prefill_chunk": 64, "target": "cpu"}
NANO_LIMIT = 1024  # patches, so 256 tokens: all of the context


@pytest.fixture(scope="module")
def nano(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pictures") / "ckpt"
    convert("nano", path)
    return path


@pytest.fixture(scope="module")
def bundle(nano) -> Path:
    path = nano.parent / "mindir"
    export(plan_export(open_converted(nano), **SIZES, image_patches=(128,)), path)
    return path


def answer(bundle: Path, processor: KimiVLProcessor, picture: Image.Image):
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe the picture."}]}
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    given = processor(text=text, images=picture, return_tensors="np")
    return given, MindIRModel.from_bundle(bundle, verify=True).generate(**given, max_new_tokens=2)


def test_a_picture_that_is_too_large_for_the_graphs_is_scaled_by_the_bundles_processor(nano, bundle):
    picture = Image.new("RGB", (14 * 40, 14 * 24), "navy")  # 960 patches
    with pytest.raises(TooLongError, match="960, but the largest graph takes 128"):
        answer(bundle, KimiVLProcessor.from_pretrained(nano), picture)
    given, ids = answer(bundle, KimiVLProcessor.from_pretrained(bundle), picture)
    assert len(given["pixel_values"]) <= 128
    assert ids.shape[1] == given["input_ids"].shape[1] + 2


def test_only_the_limit_is_another_one(nano, bundle):
    ours, theirs = (json.loads((place / FILE).read_text()) for place in (bundle, nano))
    assert ours == theirs | {"in_token_limit": fitting_limit(128)}
    assert (nano / FILE).read_bytes() == (Path(kimi_vl.nano_path()) / FILE).read_bytes()


def test_a_context_without_room_for_a_picture_and_a_question_lowers_the_limit(nano):
    made = plan_export(open_converted(nano), **SIZES)
    held = 256 - question_room(256)
    assert made.patches[-1] == 4 * held and made.picture_limit == fitting_limit(4 * held) < NANO_LIMIT
    (note,) = made.notes
    assert note.startswith(
        f"a context of 256 tokens has room for a picture of {held} tokens and a question, but"
    )
    assert f"up to {NANO_LIMIT} patches (256 tokens)" in note
    assert f"scales pictures to {made.picture_limit} (in_token_limit)" in note


def test_large_graphs_in_a_small_context_do_not_raise_the_limit(nano):
    made = plan_export(open_converted(nano), **SIZES, image_patches=(4096,))
    assert made.picture_limit == fitting_limit(4 * (256 - question_room(256)))


def test_a_context_with_room_leaves_the_file_as_it_is(nano):
    made = plan_export(open_converted(nano), **SIZES | {"seq": (512,)})
    assert made.picture_limit is None and made.adjusted == {} and made.notes == ()


@pytest.mark.parametrize("context", [2, 16, 256, 1024, 4096, 131072])
def test_a_question_has_room_beside_the_largest_picture(context):
    assert min(64, context // 2) <= question_room(context) <= context // 2


def test_without_a_processor_file_larger_pictures_are_refused(nano, tmp_path):
    weights = open_converted(nano)
    del weights.manifest.files[FILE]
    made = plan_export(weights, **SIZES)
    assert made.adjusted == {} and f"there is no {FILE} to lower it in" in made.notes[0]
