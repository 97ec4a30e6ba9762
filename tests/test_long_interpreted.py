"""Long runs of nano: 1024 greedy tokens through the interpreted Ascend bundle, and thousands of steps without growth."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from kimi_vl import nano_path
from kimi_vl.convert import convert
from kimi_vl.export import MindIRModel, export, plan_export
from kimi_vl.export.plan import open_converted
from kimi_vl.verify.cases import DEFAULT_SEED, Plan, Row, build

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

CHUNK, CONTEXTS = 64, [256, 512]
# Unequal rows: three chunks with a picture across the first border, one chunk, two, and four that end near a cache border.
ROWS = (Row(((8, 8),), tokens=150, split_at=CHUNK), Row(tokens=37), Row(tokens=100), Row(tokens=240))
STEPS = 256
MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    path = tmp_path_factory.mktemp("soak") / "ckpt"
    convert("nano", path)
    return path


def bundle(ckpt: Path, target: str, batch: int = 1) -> Path:
    path = ckpt.with_name(f"{target}-{batch}")
    sizes = {"seq": CONTEXTS[-1:], "prefill_chunk": CHUNK, "image_patches": (64,), "batch": batch}
    plan = plan_export(open_converted(ckpt), **sizes, target=target)
    assert list(plan.contexts) == CONTEXTS
    export(plan, path)
    return path


def test_1024_greedy_tokens_of_four_unequal_rows_are_torchs(ckpt):
    from kimi_vl.verify.interpreted import InterpretedModel
    from kimi_vl.verify.oracle import build_oracle
    from kimi_vl.verify.prompts import ProcessorSource

    oracle = build_oracle(nano_path())
    inputs = build(
        Plan("long", "", ROWS), ProcessorSource(Path(nano_path()), oracle.config), DEFAULT_SEED
    ).inputs
    reference = oracle.greedy(inputs, STEPS)
    model = InterpretedModel.from_bundle(bundle(ckpt, "ascend", len(ROWS)), verify=True)
    out = model.generate(**inputs, max_new_tokens=STEPS, eos_token_id=None).asnumpy()
    new = out[:, inputs["input_ids"].shape[1] :]
    assert new.shape == (len(ROWS), STEPS)
    for row, (got, want) in enumerate(zip(new, reference.tokens)):
        same = int(np.append(got == want, False).argmin())
        margin = reference.margins[row, min(same, STEPS - 1)]
        assert same == STEPS, f"row {row} leaves Torch after {same} tokens, where its margin is {margin:.2g}"


def resident() -> int:
    """Bytes that this process holds of its own, without the pages of mapped files, which the system takes as it likes."""
    (line,) = (x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


def round_of(model, ids) -> str:
    """A hash of the logits of one prompt and then of each token, through every cache length."""
    digest = hashlib.sha256()
    out = model(input_ids=ids[:, :12])
    for i in range(12, ids.shape[1]):
        out = model(input_ids=ids[:, [i]], past_key_values=out.past_key_values)
        digest.update(out.logits.asnumpy().tobytes())
    return digest.hexdigest()


def soak(model, steps: int) -> tuple[set[str], int]:
    """Rounds over all cache lengths until `steps` were taken, after one to warm up; what they gave, and the growth."""
    ids = np.random.default_rng(1).integers(0, 500, (1, CONTEXTS[-1]))
    found = {round_of(model, ids)}
    before, done = resident(), 0
    while done < steps:
        found.add(round_of(model, ids))
        done += ids.shape[1] - 12
    grown = resident() - before
    print(f"{done} steps, grown by {grown / MEGABYTE:.1f} MB")
    return found, grown


def test_10000_steps_of_a_reloaded_bundle_take_no_more_memory_and_repeat_bit_by_bit(ckpt):
    found, grown = soak(MindIRModel.from_bundle(bundle(ckpt, "cpu")), 10_000)
    assert len(found) == 1 and grown < 4 * MEGABYTE


def test_1000_steps_of_an_interpreted_bundle_too(ckpt):
    from kimi_vl.verify.interpreted import InterpretedModel

    found, grown = soak(InterpretedModel.from_bundle(bundle(ckpt, "ascend")), 1_000)
    assert len(found) == 1 and grown < 4 * MEGABYTE
