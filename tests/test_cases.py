"""The suite of cases: what it holds, and that it is always the same."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from golden import DATA

from kimi_vl.modeling.configuration import ModelConfig
from kimi_vl.verify.cases import (
    Case,
    CaseError,
    Limits,
    Plan,
    Row,
    SeededSource,
    build,
    cover_experts,
    fitted,
    select,
    suite,
)

CONFIG = ModelConfig.from_file(DATA / "tiny8-bf16")
LIMITS = Limits(contexts=(64, 128, 512), chunk=48, patches=256)
PLANS = {plan.name: plan for plan in suite(CONFIG, LIMITS)}


def case(name: str, seed: int = 1) -> Case:
    return build(PLANS[name], SeededSource(CONFIG), seed)


@pytest.mark.parametrize("name", [n for n in PLANS if not PLANS[n].impossible])
def test_a_case_fits_itself(name):
    """Media tokens fit the pictures, ids the vocabulary, calls the prompt; every picture is in the first call."""
    c = case(name)
    ids, mask = c.inputs["input_ids"], c.inputs["attention_mask"].astype(bool)
    media = ids == CONFIG.media_placeholder_token_id
    grids = c.inputs.get("image_grid_hws", np.zeros((0, 2), int))
    assert media.sum() == grids.prod(1).sum() // 4
    assert len(c.inputs.get("pixel_values", [])) == grids.prod(1).sum()
    assert ids.min() >= 0 and ids.max() < CONFIG.text.vocab_size
    assert sum(c.calls) == ids.shape[1] and min(c.calls) > 0
    assert not media[:, c.calls[0] :].any()
    assert mask[:, -1].all() and (np.diff(mask.astype(int)) >= 0).all()
    assert mask[:, : c.calls[0]].any(1).all()
    assert (ids[~mask] == CONFIG.pad_token_id).all()


@pytest.mark.parametrize("name", ["batch", "chunks"])
def test_a_case_is_always_the_same_for_a_seed(name):
    a, b, other = case(name), case(name), case(name, seed=2)
    assert all(np.array_equal(a.inputs[k], b.inputs[k]) for k in a.inputs)
    assert not np.array_equal(a.inputs["input_ids"], other.inputs["input_ids"])
    assert not np.array_equal(a.inputs["pixel_values"], other.inputs["pixel_values"])


def test_the_suite_has_what_a_prefill_alone_does_not_show():
    grids = {name: plan.grids for name, plan in PLANS.items()}
    assert len(grids["image"]) == 1 and grids["image"][0][0] != grids["image"][0][1]
    assert len(set(grids["images"])) == 2
    assert grids["tall"][0][0] > CONFIG.vision.init_pos_emb_height
    assert max(w for _, w in grids["batch"]) > CONFIG.vision.init_pos_emb_width
    batch = case("batch")
    assert len(set(batch.inputs["attention_mask"].sum(1).tolist())) == 3 and batch.new_tokens
    assert set(case("steps").calls[1:]) == {1} and set(case("batch-steps").calls[1:]) == {1}
    assert max(case("pieces").calls[1:]) > 1
    bucket = case("bucket")
    assert bucket.calls[0] < LIMITS.contexts[0] < bucket.inputs["input_ids"].shape[1]


def test_prompts_end_on_both_sides_of_every_border():
    """Of each prefill chunk, of the first cache length, of the last."""
    borders = case("borders")
    first = borders.inputs["attention_mask"][:, : borders.calls[0]].sum(1).tolist()
    assert first == [47, 48, 49, 63, 64, 65] and borders.calls[1:] == (1, 1)
    for chunk, smaller, lengths in (
        (48, (40,), [39, 40, 41, 47, 48, 49, 63, 64, 65]),
        (1024, (64, 256), [63, 64, 65, 255, 256, 257]),  # but `chunks` goes over that of 1024
    ):
        plans = suite(CONFIG, Limits((64, 4096), chunk, 256, smaller))
        rows = {plan.name: plan.rows for plan in plans}
        assert [row.tokens - 2 for row in rows["borders"]] == lengths
        assert rows["chunks"][0].split_at == chunk < rows["chunks"][0].tokens < chunk + smaller[0]
    assert case("edge").inputs["input_ids"].shape == (1, 512)
    last = case("last-token")
    assert last.inputs["input_ids"].shape == (1, 511) and last.new_tokens == 1
    small = {p.name: p for p in suite(CONFIG, Limits(contexts=(32,), chunk=32, patches=256))}
    assert small["borders"].impossible == "the context of 32 has no border"


def test_a_page_is_as_large_as_the_candidate_takes_and_a_case_of_its_own_where_that_takes_long():
    def pages(**limits):
        plans = {p.name: p for p in suite(CONFIG, Limits(**limits))}
        return {
            name: (plans[name].grids[0], plans[name].by_default)
            for name in ("page", "full-page")
            if name in plans
        }

    assert pages(contexts=(256, 512, 1024), patches=1408) == {
        "page": ((38, 26), True),
        "full-page": ((44, 30), False),
    }
    large = pages(contexts=(4096,), patches=5376)
    assert large == {"page": ((38, 26), True), "full-page": ((88, 60), False)}
    assert pages(contexts=(256,), patches=5376) == {
        "page": ((32, 22), True)
    }  # beside a question in the context


def test_a_natural_prompt_that_turns_out_too_long_is_not_run():
    class Wordy(SeededSource):
        def _ids(self, row, rng):
            return rng.choice(self.ordinary, 500)

    plan = PLANS["text"]
    assert fitted(plan, SeededSource(CONFIG), 1, CONFIG, LIMITS) == plan
    assert fitted(plan, Wordy(CONFIG), 1, CONFIG, LIMITS).impossible == "needs a context of 532, there is 512"


def test_texts_alone_are_scored():
    assert [name for name in PLANS if not PLANS[name].impossible and case(name).scored] == ["perplexity"]
    assert case("perplexity").inputs["attention_mask"].sum(1).tolist() == [96] * 3


def test_a_picture_lies_across_the_border_of_the_chunk():
    c = case("chunks")
    at = np.flatnonzero(c.inputs["input_ids"][0] == CONFIG.media_placeholder_token_id)
    assert at[0] < LIMITS.chunk <= at[-1]
    assert c.inputs["input_ids"].shape[1] > LIMITS.chunk


def test_what_a_candidate_cannot_take_says_why():
    small = {p.name: p for p in suite(CONFIG, Limits(contexts=(96,), chunk=96, patches=32))}
    assert "context of" in small["chunks"].impossible
    assert "only one length" in small["bucket"].impossible
    assert "needs 40 patches" in small["tall"].impossible
    assert not small["text"].impossible


def test_a_model_without_experts_has_no_case_for_them():
    text = dataclasses.replace(CONFIG.text, first_k_dense_replace=3)
    plans = suite(dataclasses.replace(CONFIG, text=text), LIMITS)
    assert "experts" not in [p.name for p in plans]


def test_cases_are_chosen_by_name():
    plans = list(PLANS.values())
    assert [p.name for p in select(plans, ["steps", "text"])] == ["text", "steps"]
    assert "long-greedy" not in [p.name for p in select(plans)]
    assert [p.name for p in select(plans, ["long-greedy"])] == ["long-greedy"]
    assert [p.name for p in select(plans, ["quick", "bucket"])] == ["text", "image", "steps", "bucket"]
    with pytest.raises(CaseError, match="no case 'txt'; choose from text, image"):
        select(plans, ["txt"])


def test_a_tail_longer_than_a_prompt_is_refused():
    plan = Plan("x", "", (Row(tokens=5), Row(tokens=30)), tail=(5,))
    with pytest.raises(CaseError, match="continues with 5 tokens, but a prompt has only 5"):
        build(plan, SeededSource(CONFIG))


def test_the_experts_case_grows_until_all_are_used():
    def case_of(tokens):
        return build(Plan("x", "", (Row(tokens=tokens),)), SeededSource(CONFIG))

    def used(case):
        n = case.inputs["input_ids"].shape[1]
        return [8, min(8, n // 25)]

    assert cover_experts(case_of, used, 8, 512).inputs["input_ids"].shape[1] == 256
    assert cover_experts(case_of, used, 8, 100).inputs["input_ids"].shape[1] == 100
    assert cover_experts(case_of, lambda c: [8], 8, 512).inputs["input_ids"].shape[1] == 64


def test_patches_are_those_of_one_picture():
    """Neighbouring patches continue each other: the noise alone would be as far apart anywhere."""
    patches = case("image").inputs["pixel_values"]
    assert patches.dtype == np.float32 and np.abs(patches).max() <= 1.001 and patches.shape[1:] == (3, 14, 14)
    smooth = patches.mean((2, 3))  # (24, 3)
    beside = np.abs(smooth[0] - smooth[1]).mean()
    assert beside < np.ptp(smooth, axis=0).max()
