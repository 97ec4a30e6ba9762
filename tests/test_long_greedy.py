"""Hundreds of cached steps of nano, over every border of chunks and cache lengths on the way: none leaves Torch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from golden import rel_l2

from kimi_vl import KimiVLForConditionalGeneration, nano_path
from kimi_vl.convert import convert
from kimi_vl.export import MindIRModel, export, plan_export
from kimi_vl.export.plan import open_converted
from kimi_vl.verify.cases import DEFAULT_SEED, Plan, Row, build

pytestmark = pytest.mark.slow

CHUNK, CONTEXTS, STEPS = 64, [256, 512, 1024], 512
# Three chunks with a picture across the first border; and, left padded beside it, one chunk.
ROWS = (Row(((8, 8),), tokens=150, split_at=CHUNK), Row(tokens=37))
NANO = Path(nano_path())


@pytest.fixture(scope="module")
def oracle():
    pytest.importorskip("torch")
    from kimi_vl.verify.oracle import build_oracle

    return build_oracle(NANO)


@pytest.fixture(scope="module")
def inputs_of(oracle):
    """Inputs of rows, through the processor."""
    from kimi_vl.verify.prompts import ProcessorSource

    source = ProcessorSource(NANO, oracle.config)
    return lambda *rows: build(Plan("long", "", rows), source, DEFAULT_SEED).inputs


def network(room):
    return KimiVLForConditionalGeneration.from_pretrained(
        "nano", max_context=CONTEXTS[-1], prefill_chunk=CHUNK, max_image_patches=64
    )


def bundle(room):
    convert("nano", room / "ckpt")
    sizes = {
        "target": "cpu",
        "seq": CONTEXTS[-1:],
        "prefill_chunk": CHUNK,
        "image_patches": (64,),
        "batch": len(ROWS),
    }
    export(plan_export(open_converted(room / "ckpt"), **sizes), room / "mindir")
    return MindIRModel.from_bundle(room / "mindir", verify=True)


@pytest.fixture(scope="module", params=[network, bundle], ids=lambda make: make.__name__)
def model(request, tmp_path_factory):
    made = request.param(tmp_path_factory.mktemp("long"))
    assert list(made.engine.graphs.contexts) == CONTEXTS and made.engine.graphs.chunk == CHUNK
    return made


def test_512_greedy_tokens_are_torchs(model, oracle, inputs_of):
    inputs = inputs_of(*ROWS)
    reference = oracle.greedy(inputs, STEPS)
    out = model.generate(**inputs, max_new_tokens=STEPS, eos_token_id=None).asnumpy()
    new = out[:, inputs["input_ids"].shape[1] :]
    assert new.shape == (len(ROWS), STEPS)
    for row, (got, want) in enumerate(zip(new, reference.tokens)):
        same = int(np.append(got == want, False).argmin())
        margin = reference.margins[row, min(same, STEPS - 1)]
        assert same == STEPS, f"row {row} leaves Torch after {same} tokens, where its margin is {margin:.2g}"


def test_512_given_tokens_get_torchs_logits_one_by_one(model, oracle, inputs_of):
    """Greedy answers of that length repeat themselves; text that is given does not."""
    rows = [replace(row, tokens=(row.tokens or 0) + STEPS) for row in ROWS]
    inputs = inputs_of(*rows)
    ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask")
    assert len(np.unique(ids[:, -STEPS:])) > 100
    want = oracle.run({"input_ids": ids, "attention_mask": mask, **inputs})["logits"]
    start = ids.shape[1] - STEPS
    cache = model(ids[:, :start], mask[:, :start], **inputs).past_key_values
    steps = [model(ids[:, [i]], past_key_values=cache).logits.asnumpy() for i in range(start, ids.shape[1])]
    got, want = np.concatenate(steps, 1), want[:, start:]
    assert np.array_equal(got.argmax(-1), want.argmax(-1))
    for first in range(0, STEPS, 32):  # a border is in one of them
        assert rel_l2(got[:, first : first + 32], want[:, first : first + 32]) <= 1e-5, first
