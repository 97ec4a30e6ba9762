"""The network against golden outputs of the Torch reference, and the properties of its static cache."""

from __future__ import annotations

import logging

import mindspore as ms
import numpy as np
import pytest
from golden import CASES, CHECKPOINTS, DATA, check_cache, check_case, inputs, load_case, rel_l2

from kimi_vl import KimiVLConfig, KimiVLForConditionalGeneration
from kimi_vl.modeling.buckets import TooLongError
from kimi_vl.modeling.configuration import ConfigError
from kimi_vl.modeling.engine import Row
from kimi_vl.modeling.forward import InputError

TINY = DATA / "tiny8-bf16"


def load(checkpoint: str = "tiny8-bf16", **kwargs):
    kwargs = {"max_context": 512, "prefill_chunk": 64, "max_image_patches": 128, **kwargs}
    return KimiVLForConditionalGeneration.from_pretrained(DATA / checkpoint, **kwargs)


@pytest.fixture(scope="module")
def models():
    """One model per checkpoint: its graphs are compiled once."""
    return {name: load(name) for name in CHECKPOINTS}


@pytest.fixture(scope="module")
def model(models):
    return models["tiny8-bf16"]


@pytest.fixture(scope="module")
def plain():
    """Without the C++ operators, as where they were not built."""
    return load(kernels="plain")


@pytest.mark.parametrize(("checkpoint", "name"), CASES)
def test_equals_the_reference_on(models, checkpoint, name):
    check_case(models[checkpoint], load_case(checkpoint, name))


@pytest.mark.parametrize("name", ["images2", "long", "batch"])
def test_so_do_plain_operators_on(plain, name):
    check_case(plain, load_case("tiny8-bf16", name))


@pytest.mark.parametrize("name", ["batch", "images2"])
def test_the_cache_is_right_after_32_steps(model, name):
    check_cache(model, load_case("tiny8-bf16", name))


def test_the_table_fills_every_parameter(model):
    from kimi_vl.convert.source import open_weights

    weights = open_weights(TINY)
    parameters = model.parameters_dict()
    assert sorted(weights.names()) == sorted(parameters)
    assert all(weights.spec(n)[0] == tuple(p.shape) for n, p in parameters.items())


@pytest.mark.parametrize("chunk", [256, 48, 1])
def test_one_chunk_many_chunks_and_single_steps_agree(model, monkeypatch, chunk):
    case = load_case("tiny8-bf16", "long")
    assert case["input_ids"].shape[1] % 48
    monkeypatch.setattr(model.engine.graphs, "chunk", chunk)
    assert rel_l2(model(input_ids=case["input_ids"]).logits.asnumpy(), case["logits"]) <= 1e-5


def test_a_prompt_is_continued_by_several_tokens(model):
    case = load_case("tiny8-bf16", "long")
    ids = case["input_ids"]
    first = model(input_ids=ids[:, :100])
    rest = model(input_ids=ids[:, 100:], past_key_values=first.past_key_values)
    assert first.past_key_values is rest.past_key_values
    assert rest.past_key_values.get_seq_length() == ids.shape[1]
    got = np.concatenate((first.logits.asnumpy(), rest.logits.asnumpy()), 1)
    assert rel_l2(got, case["logits"]) <= 1e-5


def test_generate_continues_a_cache(model):
    case = load_case("tiny8-bf16", "text")
    ids, greedy = case["input_ids"], case["greedy_tokens"]
    cache = model(input_ids=ids).past_key_values
    longer = np.concatenate((ids, greedy[:, :5]), 1)
    out = model.generate(
        input_ids=longer, past_key_values=cache, max_new_tokens=20, eos_token_id=None
    ).asnumpy()
    assert np.array_equal(out[:, longer.shape[1] :], greedy[:, 5:25])


def test_a_batch_row_equals_the_same_prompt_alone(model):
    case = load_case("tiny8-bf16", "batch")
    together = model(**inputs(case)).logits.asnumpy()
    at = 0
    for b in range(len(together)):
        keep = case["attention_mask"][b] == 1
        row = case["input_ids"][b : b + 1, keep]
        media = int((row == model.model_config.media_placeholder_token_id).sum()) * 4
        grids, patches = [], 0
        while patches < media:
            grids.append(case["image_grid_hws"][at])
            patches += int(grids[-1].prod())
            at += 1
        kwargs = {}
        if grids:
            before = int(case["image_grid_hws"][: at - len(grids)].prod(1).sum())
            kwargs = {
                "pixel_values": case["pixel_values"][before : before + patches],
                "image_grid_hws": np.array(grids),
            }
        alone = model(input_ids=row, **kwargs).logits.asnumpy()
        assert rel_l2(together[b][keep], alone[0]) <= 1e-5


def test_garbage_in_unwritten_rows_changes_no_bit(model):
    case = load_case("tiny8-bf16", "batch")
    clean = model(**inputs(case))
    dirty = model.engine.new_cache(3)
    for row in dirty.rows:
        for i, buffer in enumerate(row.buffers):
            buffer[:] = 1e4 * (-1) ** i
    again = model(**inputs(case), past_key_values=dirty)
    assert np.array_equal(clean.logits.asnumpy(), again.logits.asnumpy())
    token = case["greedy_tokens"][:, :1]
    step = [
        model(input_ids=token, past_key_values=o.past_key_values).logits.asnumpy() for o in (clean, again)
    ]
    assert np.array_equal(*step)


def test_a_used_cache_gives_the_bits_of_a_fresh_one(model):
    text, image = load_case("tiny8-bf16", "long"), load_case("tiny8-bf16", "image")
    cache = model(input_ids=text["input_ids"]).past_key_values
    cache.crop(0)
    used = model(**inputs(image), past_key_values=cache).logits.asnumpy()
    assert np.array_equal(used, model(**inputs(image)).logits.asnumpy())


def test_garbage_in_padded_patches_changes_no_bit(model):
    case = load_case("tiny8-bf16", "image")
    h, w = case["image_grid_hws"][0].tolist()
    engine = model.engine
    given = engine.vision_inputs(case["pixel_values"], h, w, 64)
    clean = engine.graphs.vision(64, given, False)[0][: h * w // 4].copy()
    for name in ("patches", "tap_weights", "cos", "sin"):
        given[name][h * w :] = 1e4
    dirty = engine.graphs.vision(64, given, False)[0][: h * w // 4]
    assert np.array_equal(clean, dirty)


def test_a_larger_bucket_changes_nothing(model):
    case = load_case("tiny8-bf16", "image")
    h, w = case["image_grid_hws"][0].tolist()
    engine = model.engine
    small, large = (
        engine.graphs.vision(b, engine.vision_inputs(case["pixel_values"], h, w, b), False)[0][
            : h * w // 4
        ].copy()
        for b in (64, 128)
    )
    assert rel_l2(large, small) <= 1e-5
    text = load_case("tiny8-bf16", "text")
    wide = load(max_context=2048)
    wide.engine.graphs.contexts = [2048]
    got = wide(input_ids=text["input_ids"]).logits.asnumpy()
    assert rel_l2(got, model(input_ids=text["input_ids"]).logits.asnumpy()) <= 1e-5


def test_prompts_that_fill_the_cache_to_its_last_slot(model):
    ids = load_case("tiny8-bf16", "long")["input_ids"][:, :100]
    want = model(input_ids=ids).logits.asnumpy()
    model = load(max_context=100)
    for n in (99, 100):
        assert rel_l2(model(input_ids=ids[:, :n]).logits.asnumpy(), want[:, :n]) <= 1e-5
    out = model(input_ids=ids[:, :90])
    out = model(input_ids=ids[:, 90:], past_key_values=out.past_key_values)
    assert rel_l2(out.logits.asnumpy(), want[:, 90:]) <= 1e-5
    with pytest.raises(TooLongError, match="101 tokens exceeds the context of 100 by 1"):
        model(input_ids=ids[:, :1], past_key_values=out.past_key_values)


def test_forward_takes_what_users_pass(model):
    case = load_case("tiny8-bf16", "image")
    given = inputs(case)
    out = model(**given, output_hidden_states=True, use_cache=False)
    assert out.past_key_values is None
    assert len(out.hidden_states) == model.model_config.text.num_hidden_layers + 1
    tensors = {k: ms.Tensor(v.astype(np.int32) if v.dtype.kind == "i" else v) for k, v in given.items()}
    same = model(**tensors)
    assert np.array_equal(same.logits.asnumpy(), out.logits.asnumpy())
    assert np.array_equal(same[0].asnumpy(), same["logits"].asnumpy())
    embeds = out.hidden_states[0]
    by_embeds = model(inputs_embeds=embeds, attention_mask=given["attention_mask"])
    assert rel_l2(by_embeds.logits.asnumpy(), out.logits.asnumpy()) <= 1e-6
    positions = model(input_ids=case["input_ids"], pixel_values=case["pixel_values"],
                      image_grid_hws=case["image_grid_hws"], position_ids=case["position_ids"])  # fmt: skip
    assert np.array_equal(positions.logits.asnumpy(), out.logits.asnumpy())
    assert isinstance(model(**given, return_dict=False), tuple)


def test_the_last_hidden_state_is_normed(model):
    torch = pytest.importorskip("torch")
    case = load_case("tiny8-bf16", "text")
    out = model(**inputs(case), output_hidden_states=True, output_taps=True)
    head = torch.from_numpy(model.array("language_model.lm_head.weight"))
    logits = torch.from_numpy(out.hidden_states[-1].asnumpy()) @ head.T
    assert rel_l2(logits.numpy(), case["logits"]) <= 1e-5
    assert np.array_equal(out.hidden_states[1].asnumpy(), out.taps["hidden_states"][0])


def test_labels_give_the_reference_loss(model):
    torch = pytest.importorskip("torch")
    case = load_case("tiny8-bf16", "text")
    labels = case["input_ids"].copy()
    labels[:, :7] = -100
    loss = float(model(**inputs(case), labels=labels).loss.asnumpy())
    want = torch.nn.functional.cross_entropy(
        torch.from_numpy(case["logits"])[0, :-1], torch.from_numpy(labels)[0, 1:], ignore_index=-100
    )
    assert abs(loss - want.item()) < 1e-5


@pytest.mark.parametrize(
    ("kernels", "dtype", "held"),
    [
        ("plain", "bfloat16", "float32"),
        ("plain", "float16", "float32"),
        ("cpu", "bfloat16", "bfloat16"),
        ("cpu", "float16", "float32"),
    ],
)
def test_low_precision_weights_are_rounded_and_held_as_operators_take_them(kernels, dtype, held, caplog):
    import ml_dtypes

    with caplog.at_level(logging.INFO):
        model = load("tiny8-fp32", mindspore_dtype=getattr(ms, dtype), kernels=kernels)
    assert caplog.text.count("widened to fp32") == (held == "float32")
    assert model.dtype == getattr(ms, dtype)
    full = load("tiny8-fp32").parameters_dict()
    narrow = getattr(ml_dtypes, dtype, None) or np.dtype(dtype)
    for name, p in model.parameters_dict().items():
        want = full[name].asnumpy()
        if "mlp.gate." not in name:
            want = want.astype(narrow).astype(np.float32)
            assert p.dtype == getattr(ms, held), name
        assert np.array_equal(model.array(name), want), name


def test_a_forward_runs_in_either_mode(model):
    case = load_case("tiny8-bf16", "text")
    before = ms.get_context("mode")
    results = []
    for mode in (ms.GRAPH_MODE, ms.PYNATIVE_MODE):
        ms.set_context(mode=mode)
        results.append(model(**inputs(case)).logits.asnumpy())
        assert ms.get_context("mode") == mode
    ms.set_context(mode=before)
    assert np.array_equal(*results)


def test_from_config_gives_random_weights_that_run():
    config = KimiVLConfig.from_pretrained(TINY)
    config.text_config.num_hidden_layers = 2
    config.vision_config.num_hidden_layers = 1
    model = KimiVLForConditionalGeneration._from_config(config, torch_dtype=ms.bfloat16)
    assert model.dtype == ms.bfloat16
    assert len(model.language_model.model.layers) == 2
    out = model(input_ids=np.array([[1, 2, 3]]))
    assert np.isfinite(out.logits.asnumpy()).all()


def test_parameters_can_be_loaded_the_mindspore_way(model):
    from mindspore import nn

    config = KimiVLConfig.from_pretrained(TINY)
    with nn.no_init_parameters():
        empty = KimiVLForConditionalGeneration._from_config(config)
    ids = load_case("tiny8-bf16", "text")["input_ids"]
    with pytest.raises(ConfigError, match="has no data"):
        empty(input_ids=ids)
    missing, unexpected = ms.load_param_into_net(empty, model.parameters_dict())
    assert not missing and not unexpected
    assert np.array_equal(empty(input_ids=ids).logits.asnumpy(), model(input_ids=ids).logits.asnumpy())


def test_loading_info():
    _, info = load(output_loading_info=True)
    assert info == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}


def test_a_configuration_of_another_shape_is_refused():
    config = KimiVLConfig.from_pretrained(TINY)
    config.text_config.num_hidden_layers = 4
    with pytest.raises(ConfigError, match=r"no tensor for language_model\.model\.layers\.3"):
        load(config=config)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_ids": None}, "give exactly one"),
        ({"input_ids": np.array([1, 2])}, "expected integers of shape"),
        ({"input_ids": np.array([[1, 1000]])}, "id 1000 is outside the vocabulary of 1000"),
        ({"input_ids": np.array([[1, -1]])}, "id -1 is outside"),
        ({"attention_mask": np.zeros((1, 4))}, "row 0 has no token"),
        ({"attention_mask": np.array([[1, 0, 1, 1]])}, "row 0 has a gap"),
        ({"attention_mask": np.ones((1, 2))}, "attention_mask: shape"),
        (
            {"input_ids": np.array([[1, 765, 3, 4]])},
            "pixel_values: missing, but input_ids has 1 image placeholders",
        ),
        ({"labels": np.ones((1, 3), int)}, "labels: shape"),
        ({"output_attentions": True}, "output_attentions"),
    ],
)
def test_wrong_arguments_are_named(model, change, message):
    given = {"input_ids": np.array([[1, 2, 3, 4]]), **change}
    with pytest.raises(InputError, match=message):
        model(**given)


def test_placeholders_and_images_must_match(model):
    case = load_case("tiny8-bf16", "image")
    ids = case["input_ids"].copy()
    at = np.argmax(ids[0] == 765)
    ids[0, at] = 1
    given = {**inputs(case), "input_ids": ids}
    with pytest.raises(InputError, match="5 image placeholders .* give 6 features"):
        model(**given)
    for pixels in (case["pixel_values"][:-4], case["pixel_values"][:, :2]):
        with pytest.raises(InputError, match="pixel_values: shape"):
            model(**{**inputs(case), "pixel_values": pixels})
    with pytest.raises(InputError, match="image_grid_hws: missing"):
        model(**{**inputs(case), "image_grid_hws": None})


def test_by_default_the_operators_take_a_prompt_in_chunks_that_it_fills(monkeypatch):
    model = load(prefill_chunk=None, max_context=2048)
    seen = []
    text = model.engine.graphs.text
    monkeypatch.setattr(
        model.engine.graphs, "text", lambda tokens, *rest: (seen.append(tokens), text(tokens, *rest))[1]
    )
    case = load_case("tiny8-bf16", "long")
    ids = np.tile(case["input_ids"], (1, 8))[:, :1290]
    for count, chunks in (
        (30, [64]),
        (65, [64, 1]),
        (1290, [1024, 256, 64]),
        (1, [1]),
        (1281, [1024, 256, 1]),
    ):
        seen.clear()
        cache = model.engine.new_cache(1)
        if count == 1281:  # at the end of the context what does not fit a chunk takes smaller ones
            cache.rows[0].length = 2048 - 1281
        model.engine.extend(cache, [Row(ids[0, :count])])
        assert seen == chunks
    assert model.engine.graphs.chunk == 1024
    assert rel_l2(model(input_ids=case["input_ids"]).logits.asnumpy(), case["logits"]) <= 1e-5
