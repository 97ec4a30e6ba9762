"""Real prompts and drawn pictures, through a directory's own processor."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from published import DATA, PREPROCESSOR, published_directory, write_json

from kimi_vl import nano_path
from kimi_vl.modeling.configuration import ModelConfig
from kimi_vl.modeling.processing import KimiVLProcessor
from kimi_vl.verify.cases import DIALOGUE, CaseError, Limits, Plan, Row, build, inputs_hash, suite
from kimi_vl.verify.prompts import DIALOGUES, PASSAGES, ProcessorSource, draw, draw_page, has_processor

LIMITS = Limits(contexts=(256, 512, 1024), chunk=128, patches=256)
NAMES = [plan.name for plan in suite(ModelConfig.from_file(DATA / "tiny8-bf16"), LIMITS)]


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return published_directory(tmp_path_factory.mktemp("published") / "model")


@pytest.fixture(scope="module")
def source(directory):
    return ProcessorSource(directory, ModelConfig.from_file(directory))


@pytest.fixture(scope="module")
def plans(source):
    return {plan.name: plan for plan in suite(source.config, LIMITS)}


def test_a_directory_of_weights_alone_has_no_processor(directory, tmp_path):
    assert has_processor(directory) and not has_processor(tmp_path)


@pytest.mark.parametrize("name", NAMES)
def test_a_case_fits_itself(source, plans, name):
    """Media tokens fit the pictures, which have the grids asked for; every picture is in the first call."""
    case = build(plans[name], source)
    ids, mask = case.inputs["input_ids"], case.inputs["attention_mask"]
    media = ids == source.config.media_placeholder_token_id
    grids = case.inputs.get("image_grid_hws", np.zeros((0, 2), int))
    assert [tuple(g) for g in grids.tolist()] == plans[name].grids
    assert (
        media.sum() == grids.prod(1).sum() // 4
        and len(case.inputs.get("pixel_values", [])) == grids.prod(1).sum()
    )
    assert not media[:, case.calls[0] :].any()
    for row, tokens in zip(plans[name].rows, mask.sum(1)):
        assert row.tokens in (None, tokens)
    assert len(case.prompts) == len(ids)
    assert all(("<|im_user|>" in prompt) != case.scored for prompt in case.prompts)


def test_a_natural_prompt_is_what_the_processor_makes_of_it(directory, source, plans):
    case = build(plans["text"], source)
    ids = KimiVLProcessor.from_pretrained(directory)(text=case.prompts[0], return_tensors="np")["input_ids"]
    assert np.array_equal(case.inputs["input_ids"], ids)
    assert case.prompts[0].endswith("<|im_assistant|>assistant<|im_middle|>")


def test_a_picture_lies_across_the_border_of_the_chunk(source, plans):
    ids = build(plans["chunks"], source).inputs["input_ids"][0]
    at = np.flatnonzero(ids == source.config.media_placeholder_token_id)
    assert at[0] < LIMITS.chunk <= at[-1]


def test_a_passage_is_the_beginning_of_its_text(source, plans):
    case = build(plans["perplexity"], source)
    assert case.prompts == tuple(PASSAGES.values())
    for ids, text in zip(case.inputs["input_ids"], case.prompts):
        assert text.startswith(source.processor.decode(ids).rstrip("\ufffd"))


def test_a_passage_that_is_too_short_is_refused(source):
    with pytest.raises(CaseError, match=r"the passage 'code' has \d+ tokens, expected at least 9999"):
        build(Plan("x", "", (Row(tokens=9999, passage="code"),)), source)


def test_prompts_are_always_the_same_for_a_seed(source, plans):
    a, b, other = (build(plans["batch"], source, seed) for seed in (1, 1, 2))
    assert a.prompts == b.prompts and all(np.array_equal(a.inputs[k], b.inputs[k]) for k in a.inputs)
    assert not np.array_equal(a.inputs["pixel_values"], other.inputs["pixel_values"])


def test_pictures_are_those_of_the_plan_where_the_processor_would_scale_them(source, plans, tmp_path):
    """As that of a bundle with small vision graphs does."""
    published_directory(tmp_path)
    write_json(tmp_path / "preprocessor_config.json", PREPROCESSOR | {"in_token_limit": 21})
    case, same = (build(plans["image"], s) for s in (ProcessorSource(tmp_path, source.config), source))
    assert inputs_hash(case.inputs) == inputs_hash(same.inputs)


def test_a_prompt_that_cannot_hold_its_pictures_is_refused(source):
    with pytest.raises(CaseError, match="20 tokens do not hold the pictures"):
        build(Plan("x", "", (Row(((8, 8),), tokens=20),)), source)


def test_a_conversation_is_the_processors_own(source, plans):
    """An answer with a thinking part, a picture in both turns, a system prompt of its own."""
    case = build(plans["turns"], source)
    thinking, pictures, system = case.prompts
    assert thinking.index("◁think▷") < thinking.index("◁/think▷It is 51.<|im_end|><|im_user|>")
    first, second = pictures.split("<|im_assistant|>assistant<|im_middle|>A red circle.")
    assert first.count("<|media_pad|>") == second.count("<|media_pad|>") == 1
    assert system.startswith("<|im_system|>system<|im_middle|>Answer in one word.<|im_end|>")
    assert all(prompt.endswith("<|im_assistant|>assistant<|im_middle|>") for prompt in case.prompts)


def test_conversations_are_about_as_long_as_a_plan_takes_them_to_be():
    source = ProcessorSource(Path(nano_path()), ModelConfig.from_file(nano_path()))
    lengths = [len(source._conversation(d, [draw((2, 2), 14, np.random.default_rng(0))] * (name == "pictures") * 2)[1]["input_ids"])
               for name, d in DIALOGUES.items()]  # fmt: skip
    assert max(lengths) <= DIALOGUE


@pytest.mark.parametrize("grid", [(2, 2), (48, 34)])
def test_a_page_has_text_a_table_and_a_figure(grid):
    page = np.asarray(draw_page(grid, 14, np.random.default_rng(1)))
    assert page.shape == (grid[0] * 14, grid[1] * 14, 3)
    if grid[0] > 10:
        grey = page.std(axis=2) < 8
        top, bottom = page.shape[0] // 3, page.shape[0] * 2 // 3
        middle = page.shape[1] // 2
        dark = grey & (page.mean(axis=2) < 60)
        assert 0.05 < dark[:bottom, middle:].mean() < 0.4 and 0.05 < dark[top + 14 :, :middle].mean() < 0.4
        assert (~grey[20 : top - 20, 20 : middle - 20]).mean() > 0.9  # coloured shapes
        assert (
            (grey & (np.abs(page.mean(axis=2) - 90) < 1)).sum(1) > middle // 2
        ).sum() > 5  # lines of a table


def test_pictures_have_the_size_of_their_grid():
    picture = draw((4, 6), 14, np.random.default_rng(0))
    assert picture.size == (84, 56) and len(picture.getcolors(10000)) > 1
