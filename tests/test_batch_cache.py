"""A cache that holds all rows of a batch in one parameter per layer, as on a device: natively and in a bundle.

Graphs are compiled for the CPU from Ascend's kernels, whose fused operators are replaced (see `portable`); the caches
are what a device would have.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import bundles
import mindspore as ms
import numpy as np
import portable
import pytest
from golden import DATA, check_cache, check_case, load_case, rel_l2

from kimi_vl import KimiVLForConditionalGeneration
from kimi_vl.export import MindIRModel, export, plan, plan_export
from kimi_vl.modeling import running
from kimi_vl.modeling.batch_cache import BatchBinding, CopySlots, Slots
from kimi_vl.modeling.buckets import TooLongError
from kimi_vl.modeling.cache import Batch, LatentCache
from kimi_vl.modeling.configuration import ConfigError
from kimi_vl.modeling.engine import Row
from kimi_vl.modeling.parameters import empty_parameter

pytestmark = pytest.mark.skipif(not hasattr(ms, "DeviceCtx"), reason="Ascend's kernels need MindSpore 2.10")
BF16, BAR = "tiny8-bf16", 1e-5
CONTEXTS, CHUNK = (64, 256), 32


def network(kernels: str, chunk: int) -> KimiVLForConditionalGeneration:
    return KimiVLForConditionalGeneration.from_pretrained(
        DATA / BF16, kernels=kernels, max_context=256, prefill_chunk=chunk, max_image_patches=64,
        mindspore_dtype=ms.float32,
    )  # fmt: skip


@pytest.fixture(scope="module")
def plain():
    """The network that other tests hold against Torch, with a cache per row."""
    return network("plain", 64)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """The network, and bundles of two rows per graph; what holds a cache is the same for all."""
    room = tmp_path_factory.mktemp("batch")
    sizes = {"seq": CONTEXTS, "batch": 2, "prefill_chunk": CHUNK, "image_patches": (64,)}
    with pytest.MonkeyPatch.context() as patch:
        portable.install(patch)
        cpu, ascend = plan.TARGETS["cpu"], plan.TARGETS["ascend"]
        names = ("kernels", "cache_shapes", "cache_write", "cache_writes")
        likewise = dataclasses.replace(cpu, **{name: getattr(ascend, name) for name in names})
        patch.setitem(plan.TARGETS, "cpu", likewise)
        source = plan.open_converted(bundles.converted(BF16))
        export(plan_export(source, target="cpu", **sizes), room / "bundle")
        export(plan_export(source, target="cpu", cache_write="scatter-update", **sizes), room / "flat")
        loaded = {name: MindIRModel.from_bundle(room / name) for name in ("bundle", "flat")}
        shapes = {
            name: model.bundle.graphs["decode-64"].caches[0].shape[:-1] for name, model in loaded.items()
        }
        assert shapes == {"bundle": (2, 1, 64), "flat": (2 * 64,)}
        yield {"network": network("ascend", CHUNK), **loaded}


@pytest.fixture(scope="module")
def bundle(models):
    return models["bundle"]


@contextlib.contextmanager
def copies(monkeypatch) -> Iterator[list[tuple[int, int]]]:
    """How many slots were in the parameters that a cache was copied from, and how many in those it went to."""
    made: list[tuple[int, int]] = []
    take = Slots.take

    def counted(self, batch):
        if batch.home is not None and batch.used:
            made.append((batch.home.context, self.context))
        take(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Slots, "take", counted)
        yield made


def ids_of(n: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 700, (1, n))


def extend(model, cache: LatentCache, *rows: np.ndarray) -> list[np.ndarray]:
    """Logits [n, V] of each row's new tokens."""
    outputs = model.engine.extend(cache, [Row(ids) for ids in rows], all_logits=True)
    return [np.concatenate(o.logits) if o.logits else np.zeros((0, 1)) for o in outputs]


def alone(plain, ids: np.ndarray) -> np.ndarray:
    return plain(input_ids=ids[None]).logits.asnumpy()[0]


# Numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [pytest.param("network", marks=pytest.mark.slow), "bundle", "flat"])
def test_equals_torch(models, kind):
    check_case(models[kind], load_case(BF16, "batch"), taps=False)


def test_the_cache_is_right_after_32_steps(bundle):
    check_cache(bundle, load_case(BF16, "text"))


# Where a cache is ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bundle", "flat"])
def test_a_cache_moves_when_it_grows_and_at_no_other_step(models, kind, plain, monkeypatch):
    ids = ids_of(50)
    with copies(monkeypatch) as made:
        got = models[kind].generate(input_ids=ids, max_new_tokens=30, eos_token_id=None).asnumpy()
    assert made == [(64, 64), (64, 256)]  # decoding after prefill; 64 slots are full
    want = plain.generate(input_ids=ids, max_new_tokens=30, eos_token_id=None).asnumpy()
    assert np.array_equal(got, want)


def test_a_conversation_goes_on_and_a_part_of_it_is_forgotten(bundle, plain):
    ids, other = ids_of(100), ids_of(40, seed=1)
    first = bundle(input_ids=ids[:, :30])
    cache = first.past_key_values
    second = bundle(input_ids=ids[:, 30:], past_key_values=cache)
    got = np.concatenate((first.logits.asnumpy(), second.logits.asnumpy()), 1)
    assert rel_l2(got, plain(input_ids=ids).logits.asnumpy()) <= BAR
    cache.crop(20)
    third = bundle(input_ids=other, past_key_values=cache).logits.asnumpy()
    want = plain(input_ids=np.concatenate((ids[:, :20], other), 1)).logits.asnumpy()
    assert rel_l2(third, want[:, 20:]) <= BAR
    longer = np.concatenate((ids[:, :20], other, ids[:, :1]), 1)
    options = {"max_new_tokens": 8, "eos_token_id": None}
    got = bundle.generate(input_ids=longer, past_key_values=cache, **options).asnumpy()
    assert np.array_equal(got, plain.generate(input_ids=longer, **options).asnumpy())


def test_two_caches_take_turns_on_the_same_graphs(bundle, plain, monkeypatch):
    texts = [ids_of(45, seed) for seed in (2, 3)]
    caches = [bundle(input_ids=ids[:, :40]).past_key_values for ids in texts]
    wants = [plain(input_ids=ids).logits.asnumpy() for ids in texts]
    with copies(monkeypatch) as made:
        for at in range(40, 45):
            for ids, cache, want in zip(texts, caches, wants):
                got = bundle(input_ids=ids[:, at : at + 1], past_key_values=cache).logits.asnumpy()
                assert rel_l2(got[0, 0], want[0, at]) <= BAR
    # one out and one in at every turn; at the first, both come from the prefill graph or its spare
    assert len(made) == 2 * 10 - 1


def test_parameters_of_a_cache_that_is_gone_are_used_again():
    parameters = [empty_parameter((1, 1, 8, 4), ms.float32, f"cache.{i}") for i in range(2)]
    binding = BatchBinding(parameters, 8)
    batches = [Batch(1) for _ in range(3)]
    for batch in batches:
        with binding.holding(batch.rows, 1):
            batch.rows[0].length = 1
    assert len(binding._spares) == 2
    del batches, batch
    for batch in (kept := [Batch(1) for _ in range(3)]):
        with binding.holding(batch.rows, 1):
            batch.rows[0].length = 1
    assert len(binding._spares) == 2 and kept[0].home in binding._spares


@pytest.mark.parametrize(("source", "target"), [(4, 8), (8, 4), (8, 8)])
@pytest.mark.parametrize("dtype", [ms.float32, ms.float16])  # a CPU has no assignment in bf16
@pytest.mark.parametrize("flat", [False, True])
def test_slots_are_copied_bit_for_bit(source, target, dtype, flat):
    rng = np.random.default_rng(0)
    homes = [
        Slots(
            [empty_parameter((2 * n, 4) if flat else (2, 1, n, 4), dtype, f"cache.{i}") for i in range(2)], n
        )
        for n in (source, target)
    ]
    content = [rng.standard_normal(homes[0].parameters[0].shape).astype(np.float32) for _ in range(2)]
    for parameter, a in zip(homes[0].parameters, content):
        parameter.set_data(running.tensor(a, running.name(dtype)))
    batch = Batch(2)
    homes[0].take(batch)
    batch.rows[1].length = 3
    homes[1].take(batch)
    assert batch.home is homes[1] and homes[0].owner is None
    for a, parameter in zip(homes[0].parameters, homes[1].parameters):
        n = min(source, target)
        got, want = (running.array(p).reshape(2, -1, 4) for p in (parameter, a))
        assert np.array_equal(got[:, :n], want[:, :n]) and want.any() and not got[:, n:].any()


# Rows of a batch -----------------------------------------------------------------------------------------------------


def test_rows_of_a_batch_have_lengths_of_their_own(bundle, plain):
    texts = [
        ids_of(n, seed=n)[0] for n in (70, 5, 33)
    ]  # graphs of two rows: one of the second two is nobody's
    cache = bundle.engine.new_cache(3)
    got = [extend(bundle, cache, *(ids[:n] for ids, n in zip(texts, (60, 4, 33))))]
    got.append(extend(bundle, cache, *(ids[n:] for ids, n in zip(texts, (60, 4, 33)))))
    assert cache.lengths.tolist() == [70, 5, 33]
    for b, ids in enumerate(texts):
        assert rel_l2(np.concatenate([g[b] for g in got if len(g[b])]), alone(plain, ids)) <= BAR


@pytest.mark.parametrize("held", [224, 225, 256])
def test_a_row_that_only_runs_along_is_not_harmed_however_full(bundle, plain, held):
    full, short = ids_of(256, seed=4)[0], ids_of(48, seed=5)[0]
    cache = bundle.engine.new_cache(2)
    extend(bundle, cache, full[:held], short[:3])
    got = extend(bundle, cache, full[:0], short[3:])[1]  # more than a chunk
    assert rel_l2(got, alone(plain, short)[3:]) <= BAR
    at = min(held, 255)
    cache.crop(at)
    (logits, _) = extend(bundle, cache, full[at : at + 1], short[:0])
    assert rel_l2(logits[0], alone(plain, full[: at + 1])[at]) <= BAR


@pytest.mark.parametrize("n", [255, 256])
def test_prompts_that_fill_the_cache_to_its_last_slot(bundle, plain, n):
    ids = ids_of(n, seed=6)
    out = bundle(input_ids=ids)
    assert rel_l2(out.logits.asnumpy(), plain(input_ids=ids).logits.asnumpy()) <= BAR
    with pytest.raises(TooLongError, match="exceeds the context of 256"):
        bundle(input_ids=ids[:, :2], past_key_values=out.past_key_values)


# What a device is given ----------------------------------------------------------------------------------------------


def test_on_ascend_the_network_takes_its_kernels_and_the_weights_as_they_are_stored(monkeypatch):
    monkeypatch.setattr(running, "device", lambda: "Ascend")
    model = KimiVLForConditionalGeneration.from_pretrained(DATA / BF16, max_context=64, prefill_chunk=16)
    assert model.engine.graphs.together and model.kernels.__name__.endswith(".ascend")
    for name, parameter in model.parameters_dict().items():
        wide = name.endswith(("mlp.gate.weight", "mlp.gate.e_score_correction_bias"))
        assert parameter.dtype == (ms.float32 if wide else ms.bfloat16)
    assert model.array("language_model.lm_head.weight").dtype == np.float32
    seen = []

    def run(cell, dtypes, inputs):
        seen.append((cell, dtypes))
        return [np.zeros((1, 1, 1000), np.float32)]

    monkeypatch.setattr(running, "run_cell", run)
    monkeypatch.setattr(CopySlots, "compile_and_run", lambda *_: None)  # a CPU has no assignment in bf16
    model.generate(input_ids=ids_of(20), max_new_tokens=4, eos_token_id=None)
    cells = {id(cell): cell for cell, _ in seen}.values()
    assert len(cells) == 2  # for a chunk and for a token
    for cell in cells:
        assert cell.jit_config_dict["jit_level"] == "O0"
        assert {p.dtype for p in cell.caches} == {ms.bfloat16}
    assert seen[0][1]["embeds"] == "bfloat16" and seen[0][1]["start"] == "int32"
    weights = [{id(p) for p in cell.get_parameters() if not p.name.startswith("slots")} for cell in cells]
    assert all(w == weights[0] for w in weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": "plain"}, "kernels: plain, .* but MindSpore runs on Ascend"),
        ({"mindspore_dtype": ms.float32}, "dtype: float32, .* mindspore_dtype=mindspore.bfloat16"),
    ],
)
def test_what_ascend_cannot_run_is_refused(monkeypatch, options, message):
    monkeypatch.setattr(running, "device", lambda: "Ascend")
    with pytest.raises(ConfigError, match=message):
        KimiVLForConditionalGeneration.from_pretrained(DATA / BF16, **options)


def test_inputs_are_rounded_to_the_dtype_and_outputs_are_fp32_again():
    x = np.array([1.0, 1 + 2**-12], np.float32)
    for dtype, want in (("bfloat16", [1.0, 1.0]), ("float32", x.tolist())):
        sent = running.tensor(x, dtype)
        assert running.name(sent.dtype) == dtype
        assert running.array(sent).dtype == np.float32 and running.array(sent).tolist() == want
