"""Nothing that a graph must not read has any part in what it gives: poisoned with garbage, all bits stay the same.

Finite garbage stands where a device's memory holds what another chat left: cache slots that no token wrote, padded
patches, tokens past a prompt's end, rows that have nothing to do. What operators leave undefined (queries past the actual
length, rows beyond the last group) is NaN in the interpreter already.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from golden import inputs, load_case
from test_ascend_interpreted import BF16, bundle

from kimi_vl.verify.interpreted import InterpretedModel
from kimi_vl.verify.mindir import products
from kimi_vl.verify.mindir.values import wide

pytestmark = pytest.mark.usefixtures("one_torch_thread")
HUGE = 1e15  # with fp32 on the way, its products stay finite


@pytest.fixture
def rows_alone(monkeypatch):
    """Rows of an expert one by one: garbage goes to experts too, and BLAS adds a row's terms in an order that depends on
    how many rows there are. All other products have as many rows as ever."""
    together = products.product

    def alone(x, weight):
        if not weight.is_contiguous():  # a linear, whose weight is transposed
            return together(x, weight)
        weight = wide(weight)
        return torch.cat([together(row, weight) for row in x.split(1)])

    monkeypatch.setattr(products, "product", alone)


class Poisoned:
    """The graphs of an engine, with garbage wherever the host pads."""

    def __init__(self, graphs, pad, width=HUGE):
        self._graphs, self._pad, self._width = graphs, pad, width
        self._rng = np.random.default_rng(7)
        self.poisoned = dict.fromkeys(("patches", "tokens", "rows"), 0)

    def __getattr__(self, name):
        return getattr(self._graphs, name)

    def _garbage(self, shape):
        return (self._rng.choice([-1, 1], shape) * self._rng.uniform(0.5, 1, shape) * self._width).astype(
            np.float32
        )

    def vision(self, patches, inputs, taps):
        valid = int(inputs["valid"][0])
        for name in ("patches", "tap_weights", "cos", "sin"):
            inputs[name][valid:] = self._garbage(inputs[name][valid:].shape)
        self.poisoned["patches"] += patches - valid
        return self._graphs.vision(patches, inputs, taps)

    def text(self, tokens, context, rows, inputs, all_logits, taps):
        """A row's valid tokens are those before its trailing pads; a row of pads alone has nothing to do."""
        ids = inputs["input_ids"]
        for b, row in enumerate(ids):
            used = np.flatnonzero(row != self._pad)
            n = int(used[-1]) + 1 if len(used) else 0
            if n == 0:
                inputs["start"][b] = self._rng.integers(0, context - tokens + 1)
                self.poisoned["rows"] += 1
            self.poisoned["tokens"] += tokens - n
            ids[b, n:] = self._rng.integers(0, 1000, tokens - n)
            inputs["embeds_mask"][b, n:] = 1
            inputs["embeds"][b, n:] = self._garbage(inputs["embeds"][b, n:].shape)
        return self._graphs.text(tokens, context, rows, inputs, all_logits, taps)


def fill(cache, rng, width=HUGE):
    for row in cache.rows:
        for buffer in row.buffers:
            buffer[:] = rng.choice([-1, 1], buffer.shape) * width


def model(poisoned=False, target="ascend", **changed):
    made = InterpretedModel.from_bundle(bundle(target, **changed))
    if poisoned:
        made.engine.graphs = Poisoned(made.engine.graphs, made.engine.config.pad_token_id)
        new, rng = made.engine.new_cache, np.random.default_rng(3)

        def dirty(batch):
            cache = new(batch)
            fill(cache, rng)
            return cache

        made.engine.new_cache = dirty
    return made


def everything(made, case, steps=4):
    """Logits and taps of a prompt, and the logits of some tokens after it."""
    out = made(**inputs(case), output_taps=True)
    results = {"logits": out.logits.asnumpy(), **out.taps}
    for column in case["greedy_tokens"].T[:steps]:
        out = made(input_ids=column[:, None], past_key_values=out.past_key_values)
        results[f"step {len(results)}"] = out.logits.asnumpy()
    return results


@pytest.mark.parametrize(
    ("case", "target", "changed"),
    [
        ("image", "ascend", {}),
        ("batch", "ascend", {"batch": 2}),
        ("image", "ascend", {"attention": "plain"}),
        ("image", "lite", {}),
    ],
)
def test_garbage_where_nothing_reads_changes_no_bit(case, target, changed, rows_alone):
    golden = load_case(BF16, case)
    clean = everything(model(False, target, **changed), golden)
    dirty_model = model(True, target, **changed)
    dirty = everything(dirty_model, golden)
    poisoned = dirty_model.engine.graphs.poisoned
    assert all(n > 0 for what, n in poisoned.items() if what != "rows" or "batch" in changed)
    mask = golden["attention_mask"].astype(bool)
    for name, want in clean.items():
        got = dirty[name]
        if want.shape[:2] == mask.shape:  # of a prompt: of its own tokens
            got, want = got[mask], want[mask]
        assert got.tobytes() == want.tobytes(), name


def test_garbage_that_is_read_is_seen():
    """The same garbage one slot or one patch too early."""
    golden = load_case(BF16, "image")
    clean = everything(model(), golden)
    early = model(poisoned=True)
    run = early.engine.graphs.vision
    early.engine.graphs.vision = lambda n, arrays, taps: run(n, arrays | {"valid": arrays["valid"] - 1}, taps)
    dirty = everything(early, golden)
    assert not np.array_equal(dirty["projector_out"], clean["projector_out"])
    made = model()
    out = made(**inputs(golden))
    row = out.past_key_values.rows[0]
    row.buffers[1][row.length - 1] = 1
    step = made(input_ids=golden["greedy_tokens"][:, :1], past_key_values=out.past_key_values)
    assert not np.array_equal(step.logits.asnumpy(), clean["step 6"])


def chat(made, case, cache=None):
    """The logits of a prompt and four tokens; and the cache, which another chat may begin with."""
    out = made(**inputs(case), past_key_values=cache)
    logits = [out.logits.asnumpy()]
    for column in case["greedy_tokens"].T[:4]:
        out = made(input_ids=column[:, None], past_key_values=out.past_key_values)
        logits.append(out.logits.asnumpy())
    return logits, out.past_key_values


@pytest.mark.parametrize(("first", "second", "batch"), [("image", "text", 1), ("batch", "batch", 2)])
@pytest.mark.parametrize("arithmetic", ["lifted", "rounded"])
def test_a_chat_in_the_cache_of_an_earlier_one_is_as_in_a_fresh_one(first, second, batch, arithmetic):
    made = InterpretedModel.from_bundle(bundle("ascend", batch=batch), arithmetic=arithmetic)
    _, cache = chat(made, load_case(BF16, first))
    cache.crop(0)
    case = load_case(BF16, second)
    again, _ = chat(made, case, cache)
    fresh, _ = chat(made, case)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(again, fresh, strict=True))
