"""The processor: prompts, placeholders, batches, and every call of the published one."""

from __future__ import annotations

import base64

import numpy as np
import pytest
from PIL import Image
from published import CASES, DATA, published_directory, tokenizer_config, write_json

from kimi_vl import KimiVLImageProcessor, KimiVLProcessor, TikTokenTokenizer

PAD = CASES["special"]["<|media_pad|>"]
FILL = CASES["special"]["[PAD]"]
PICTURE = DATA / "imgproc" / "rgb_13x29.png"  # 4 x 2 patches, 2 tokens
IMAGE = "<|media_start|>image<|media_content|><|media_pad|><|media_end|>"


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    return KimiVLProcessor.from_pretrained(published_directory(tmp_path_factory.mktemp("model")))


def picture(rows: int, columns: int) -> Image.Image:
    """One that becomes a grid of `rows` x `columns` patches."""
    pixels = np.random.default_rng(rows * 100 + columns).integers(
        0, 256, (14 * rows, 14 * columns, 3), np.uint8
    )
    return Image.fromarray(pixels)


def user(*parts) -> list[dict]:
    return [{"role": "user", "content": list(parts)}]


def says(text: str) -> dict:
    return {"type": "text", "text": text}


@pytest.mark.parametrize("case", CASES["chat"], ids=range(len(CASES["chat"])))
def test_golden_chats(processor, case):
    text = processor.apply_chat_template(
        case["messages"], add_generation_prompt=case["add_generation_prompt"]
    )
    assert text == case["rendered"]
    images = [picture(*grid) for grid in case["image_grid_hws"]]
    out = processor(text=text, images=images or None, return_tensors="np")
    assert out["input_ids"].tolist() == [case["ids"]]
    assert out["attention_mask"].tolist() == [[1] * len(case["ids"])]
    assert ("pixel_values" in out) == bool(images)
    if images:
        assert out["image_grid_hws"].tolist() == case["image_grid_hws"]


def test_the_calls_of_the_quick_start(processor):
    import mindspore as ms

    messages = user(
        {"text": None, "type": "image"}, {"text": "Describe this image in detail.", "type": "text"}
    )
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    image = Image.open(PICTURE)
    first = processor(text=text, images=image, return_tensors="np")
    second = processor(images=image, text=text, padding=True, truncation=True, return_tensors="np")
    want = {
        "input_ids": np.int64,
        "attention_mask": np.int64,
        "pixel_values": np.float32,
        "image_grid_hws": np.int64,
    }
    for inputs in (first, second):
        assert {k: v.dtype for k, v in inputs.items()} == want
        assert np.array_equal(inputs.input_ids, first["input_ids"])
    for key, value in first.items():
        first[key] = ms.Tensor(value)
    assert {**first}.keys() == want.keys()
    generated = [
        [*row, 72, 307, 108, 111, CASES["special"]["<|im_end|>"]] for row in second["input_ids"].tolist()
    ]
    trimmed = [out[len(given) :] for given, out in zip(second.input_ids, np.array(generated))]
    assert processor.decode(trimmed[0], skip_special_tokens=True) == "Hello"
    texts = processor.batch_decode(trimmed, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert texts == ["Hello"]


def test_placeholders_take_their_pictures_in_row_order(processor):
    grids = [(2, 2), (4, 6), (2, 8)]
    out = processor(
        text=[f"a {IMAGE}", "b", f"{IMAGE} c {IMAGE}"],
        images=[picture(*g) for g in grids],
        return_tensors="np",
    )
    assert [row.count(PAD) for row in out["input_ids"].tolist()] == [1, 0, 6 + 4]
    assert out["image_grid_hws"].tolist() == [list(g) for g in grids]
    assert len(out["pixel_values"]) == sum(h * w for h, w in grids)


def test_pictures_may_be_given_row_by_row(processor):
    text = [f"a {IMAGE}", "b", f"{IMAGE} c {IMAGE}"]
    a, b, c = picture(2, 2), picture(4, 6), picture(2, 8)
    nested = processor(text=text, images=[[a], [], [b, c]], return_tensors="np")
    flat = processor(text=text, images=[a, b, c], return_tensors="np")
    for key in flat:
        assert np.array_equal(nested[key], flat[key])
    with pytest.raises(ValueError, match="row 0 of the text has 1 image placeholders .* but 2 images"):
        processor(text=text, images=[[a, b], [], [c]])


@pytest.mark.parametrize(
    ("text", "images", "message"),
    [
        (f"{IMAGE} {IMAGE}", 1, r"has 2 image placeholders \(<\|media_pad\|>\), but 1 images"),
        ("no place", 2, "has 0 image placeholders .* but 2 images"),
        (IMAGE, 0, "has 1 image placeholders .* but 0 images"),
        (["a", IMAGE], 2, "has 1 image placeholders .* but 2 images"),
    ],
)
def test_counts_that_differ_are_an_error_that_says_both(processor, text, images, message):
    with pytest.raises(ValueError, match=message) as e:
        processor(text=text, images=[picture(2, 2)] * images or None)
    assert "\n" not in str(e.value)


def test_a_large_picture_has_all_its_tokens(processor):
    """16384 patches: 4096 placeholders, more text than the tokenizer takes in one slice."""
    big = KimiVLProcessor(KimiVLImageProcessor(in_token_limit=16384), processor.tokenizer)
    out = big(text=f"x{IMAGE}y", images=Image.new("RGB", (128 * 14, 128 * 14)), return_tensors="np")
    assert out["input_ids"].shape == (1, len(processor.tokenizer.encode(f"x{IMAGE}y")) + 4095)


def test_batches_are_padded_on_the_left(processor):
    texts = ["a", "b c d e f", f"x {IMAGE}"]
    alone = [processor(text=t, images=picture(2, 6) if IMAGE in t else None)["input_ids"][0] for t in texts]
    out = processor(text=texts, images=picture(2, 6), padding=True, return_tensors="np")
    longest = max(map(len, alone))
    for row, mask, ids in zip(out["input_ids"].tolist(), out["attention_mask"].tolist(), alone):
        assert row == [FILL] * (longest - len(ids)) + ids
        assert mask == [0] * (longest - len(ids)) + [1] * len(ids)
    right = processor(text=texts[:2], padding=True, padding_side="right")
    assert right["input_ids"][0] == alone[0] + [FILL] * (len(alone[1]) - len(alone[0]))
    wide = processor(text=texts[:2], padding="max_length", max_length=20, return_tensors="np")
    assert wide["input_ids"].shape == (2, 20)
    assert processor(
        text=texts[:2], padding=True, pad_to_multiple_of=16, return_tensors="np"
    ).input_ids.shape == (2, 16)


def test_rows_stay_as_they_are_unless_tensors_are_asked_for(processor):
    out = processor(text=["a", "b c d"])
    assert [len(r) for r in out["input_ids"]] == [len(m) for m in out["attention_mask"]] == [1, 4]
    assert processor(text=["a", "b c d"], return_tensors="np")["input_ids"].shape == (2, 4)
    with pytest.raises(ValueError, match="the rows have 1, 4 tokens, which is no tensor; use padding=True"):
        processor(text=["a", "b c d"], padding=False, return_tensors="np")
    with pytest.raises(ValueError, match="padding is 'widest'"):
        processor(text="a", padding="widest")
    with pytest.raises(ValueError, match="needs max_length"):
        processor(text="a", padding="max_length")


def test_truncation_never_cuts_a_picture(processor):
    out = processor(
        text=f"{IMAGE} and a text that follows", images=picture(2, 6), truncation=True, max_length=10
    )
    assert len(out["input_ids"][0]) == 10 and out["input_ids"][0].count(PAD) == 3
    full = processor(text=f"{IMAGE} and a text that follows", images=picture(2, 6), max_length=10)
    assert len(full["input_ids"][0]) > 10  # only cut when asked to
    with pytest.raises(ValueError, match="row 1 has .* cutting it to 8 would take away part of an image"):
        processor(text=["short", f"some text {IMAGE}"], images=picture(2, 6), truncation=True, max_length=8)


def test_mindspore_tensors(processor):
    import mindspore as ms

    out = processor(text=["a", f"b {IMAGE}"], images=picture(2, 2), return_tensors="ms")
    want = processor(text=["a", f"b {IMAGE}"], images=picture(2, 2), return_tensors="np")
    assert all(isinstance(v, ms.Tensor) for v in out.values())
    for key in want:
        assert np.array_equal(out[key].asnumpy(), want[key])


def test_chats_with_their_pictures_in_one_step(processor):
    encoded = base64.b64encode(PICTURE.read_bytes()).decode()
    array = np.asarray(Image.open(PICTURE))
    want = processor(
        text=processor.apply_chat_template(
            user({"type": "image"}, says("What?")), add_generation_prompt=True
        ),
        images=PICTURE,
        return_tensors="np",
    )
    for part in (
        {"type": "image", "image": str(PICTURE)},
        {"type": "image", "image": array},
        {"type": "image", "path": PICTURE},
        {"type": "image", "url": f"data:image/png;base64,{encoded}"},
        {"type": "image", "base64": encoded},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}},
    ):
        out = processor.apply_chat_template(
            user(part, says("What?")),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="np",
        )
        assert out.keys() == want.keys()
        for key in want:
            assert np.array_equal(out[key], want[key]), (part["type"], key)
    ids = processor.apply_chat_template(user(part, says("What?")), add_generation_prompt=True, tokenize=True)
    assert ids == want["input_ids"].tolist()
    with pytest.raises(ValueError, match="has 1 image placeholders .* but 0 images"):
        processor.apply_chat_template(user({"type": "image"}), tokenize=True)


def test_several_chats_at_once(processor):
    chats = [
        user(says("a")),
        user({"type": "image", "image": PICTURE}, says("b")),
        [{"role": "user", "content": "c"}],
    ]
    texts = processor.apply_chat_template(chats)
    assert texts == [processor.apply_chat_template(chat) for chat in chats]
    out = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="np", padding=True
    )
    want = processor(text=texts, images=PICTURE, return_tensors="np")
    assert np.array_equal(out["input_ids"], want["input_ids"])


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        ([], "no list of messages, or has none"),
        ("hi", "no list of messages"),
        ([{"role": "tool", "content": "x"}], "role 'tool', expected"),
        ([{"role": "user", "content": None}], "has no content"),
        ([{"role": "user"}], "has no content"),
        (user({"type": "video", "video": "x.mp4"}), "type 'video', expected 'text' or 'image'"),
        (user({"type": "text", "text": None}), "type 'text'"),
    ],
)
def test_a_conversation_without_sense_is_refused(processor, conversation, message):
    for tokenize in (False, True):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(conversation, tokenize=tokenize)


def test_the_directorys_chat_template_is_used(tmp_path):
    directory = published_directory(tmp_path / "model")
    messages = [{"role": "user", "content": "hi"}]
    write_json(
        directory / "tokenizer_config.json", tokenizer_config(chat_template="T {{ messages[0].content }}")
    )
    assert KimiVLProcessor.from_pretrained(directory).apply_chat_template(messages) == "T hi"
    (directory / "chat_template.jinja").write_text("J {{ messages[0].content }}{{ more }}")
    processor = KimiVLProcessor.from_pretrained(directory)
    assert processor.apply_chat_template(messages, more="!") == "J hi!"
    assert processor.tokenizer.apply_chat_template(messages, tokenize=False) == "J hi"
    assert (
        processor.apply_chat_template(messages, chat_template="given {{ messages[0].role }}") == "given user"
    )


def test_saving_and_loading_again_changes_nothing(processor, tmp_path):
    processor.save_pretrained(tmp_path)
    assert {"tiktoken.model", "tokenizer_config.json", "preprocessor_config.json"} <= {
        p.name for p in tmp_path.iterdir()
    }
    again = KimiVLProcessor.from_pretrained(tmp_path)
    assert again.image_processor.to_dict() == processor.image_processor.to_dict()
    text = f"a {IMAGE} 请"
    one, two = (p(text=text, images=PICTURE, return_tensors="np") for p in (processor, again))
    for key in one:
        assert np.array_equal(one[key], two[key])
    messages = user(says("x"))
    assert again.apply_chat_template(messages) == processor.apply_chat_template(messages)


def test_what_the_model_cannot_take_is_refused(processor):
    with pytest.raises(ValueError, match="only text and images"):
        processor(text="a", videos=["x.mp4"])
    with pytest.raises(ValueError, match="neither text nor images"):
        processor()
    with pytest.raises(ValueError, match="expected a string or a list of strings"):
        processor(text=[["a"]])
    with pytest.raises(TypeError, match="paddding"):
        processor(text="a", paddding=True)
    with pytest.raises(ValueError, match="outside the vocabulary of 1000"):
        processor(text="<|reserved_token_1000|>")


def test_parts_of_another_model_are_refused():
    names = {744: "[BOS]", 745: "[EOS]", 999: "[PAD]"}
    tokenizer = TikTokenTokenizer(DATA / "tokenizer" / "tiktoken.model", names)
    with pytest.raises(ValueError, match=r"has no special token <\|media_pad\|>"):
        KimiVLProcessor(KimiVLImageProcessor(), tokenizer)
    with pytest.raises(ValueError, match="there is no preprocessor_config.json"):
        KimiVLProcessor.from_pretrained(DATA / "tokenizer")


def test_pictures_alone(processor):
    out = processor(images=[PICTURE, PICTURE], return_tensors="np")
    assert out.keys() == {"pixel_values", "image_grid_hws"}
    assert out["image_grid_hws"].tolist() == [[4, 2]] * 2
