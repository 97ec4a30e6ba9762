"""`generate`: its options mean what transformers' do, and it ends where it should."""

from __future__ import annotations

import logging

import mindspore as ms
import numpy as np
import pytest
from golden import DATA, load_case
from mindspore import nn
from published import published_directory
from transformers import GenerationConfig, TextIteratorStreamer, TextStreamer

from kimi_vl import KimiVLForConditionalGeneration, TikTokenTokenizer
from kimi_vl.modeling.buckets import TooLongError
from kimi_vl.modeling.forward import InputError
from kimi_vl.modeling.generation import resolve
from kimi_vl.modeling.sampling import Sampling

TINY = DATA / "tiny8-bf16"
CONTEXT = 64
PROMPT = load_case("tiny8-bf16", "text")["input_ids"]  # 23 tokens
GREEDY = load_case("tiny8-bf16", "text")["greedy_tokens"][0]  # 32 tokens; the first nine all differ
PAD = 999


@pytest.fixture(scope="module")
def model():
    """One for the whole file: its few graphs are compiled once."""
    return KimiVLForConditionalGeneration.from_pretrained(TINY, max_context=CONTEXT, prefill_chunk=16)


def new_tokens(model, ids=PROMPT, **options) -> list[int]:
    """The first row's new tokens."""
    return model.generate(input_ids=ids, **options).asnumpy()[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.5},
        {"repetition_penalty": 1.3, "min_new_tokens": 9, "eos_token_id": int(GREEDY[3])},
        {"eos_token_id": [1, int(GREEDY[7])]},
        {"max_length": 30},
    ],
    ids=str,
)
def test_whole_answers_are_those_of_transformers_generate(model, options):
    torch = pytest.importorskip("torch")
    from kimi_vl.verify.oracle import build_oracle

    options = {"do_sample": False, "pad_token_id": PAD, "eos_token_id": None, **options}
    if "max_length" not in options:
        options["max_new_tokens"] = 16
    network = build_oracle(TINY).network
    want = network.generate(input_ids=torch.from_numpy(PROMPT), use_cache=True, **options)
    got = model.generate(input_ids=PROMPT, **options)
    assert np.array_equal(got.asnumpy(), want.numpy())


@pytest.mark.skipif(not hasattr(nn.Cell, "compile_phase"), reason="this MindSpore tells cells no phase")
def test_a_compiled_graph_runs_without_a_way_through_its_cells(model):
    first = new_tokens(model, max_new_tokens=4)
    model.language_model.compile_phase = "as it was"  # MindSpore would tell every cell at every call
    assert new_tokens(model, max_new_tokens=4) == first
    assert model.language_model.model.layers[0].compile_phase == "as it was"


# Seeds ---------------------------------------------------------------------------------------------------------------

HOT = {"do_sample": True, "temperature": 3.0, "top_k": None, "max_new_tokens": 6, "eos_token_id": None}


def test_a_seed_gives_the_same_tokens_again_and_another_seed_others(model):
    first = new_tokens(model, seed=5, **HOT)
    assert first == new_tokens(model, seed=5, **HOT)
    assert first != new_tokens(model, seed=6, **HOT)
    assert first != new_tokens(model, **HOT) != new_tokens(model, **HOT)


@pytest.mark.parametrize("set_seed", ["mindspore", "transformers"])
def test_the_frameworks_own_seeds_count_too(model, set_seed):
    import transformers

    put = {"mindspore": ms.set_seed, "transformers": transformers.set_seed}[set_seed]
    put(1)
    first = new_tokens(model, **HOT), new_tokens(model, **HOT)
    put(1)
    assert first == (new_tokens(model, **HOT), new_tokens(model, **HOT))
    assert first[0] != first[1]


def test_rows_of_a_batch_draw_from_streams_of_their_own(model):
    batch = np.concatenate((PROMPT, PROMPT))
    out = model.generate(input_ids=batch, seed=5, **HOT).asnumpy()[:, PROMPT.shape[1] :]
    assert out[0].tolist() == new_tokens(model, seed=5, **HOT)
    assert out[0].tolist() != out[1].tolist()


# Where an answer ends ------------------------------------------------------------------------------------------------


def test_the_first_of_several_stop_ids_ends_the_answer_and_belongs_to_it(model):
    stops = [int(GREEDY[5]), int(GREEDY[2]), 1]
    assert new_tokens(model, eos_token_id=stops) == GREEDY[:3].tolist()
    assert new_tokens(model, eos_token_id=np.array(stops)) == GREEDY[:3].tolist()
    assert new_tokens(model, eos_token_id=stops[0]) == GREEDY[:6].tolist()


def test_no_stop_id_means_no_stop(model, monkeypatch):
    monkeypatch.setattr(model, "generation_config", GenerationConfig(eos_token_id=int(GREEDY[2])))
    assert new_tokens(model, max_new_tokens=8) == GREEDY[:3].tolist()
    assert new_tokens(model, max_new_tokens=8, eos_token_id=None) == GREEDY[:8].tolist()


def test_twenty_tokens_unless_asked_otherwise(model):
    assert new_tokens(model, eos_token_id=None) == GREEDY[:20].tolist()


def test_stop_ids_cannot_come_before_min_new_tokens(model):
    stop = int(GREEDY[2])
    out = new_tokens(model, eos_token_id=[stop, 10**6], min_new_tokens=3, max_new_tokens=12)
    assert out[:2] == GREEDY[:2].tolist() and out[2] != stop
    assert new_tokens(model, eos_token_id=stop, min_new_tokens=2) == GREEDY[:3].tolist()


def test_finished_rows_are_filled_with_pad(model):
    prompts = np.full((2, PROMPT.shape[1]), PAD)
    prompts[0], prompts[1, -9:] = PROMPT[0], PROMPT[0, :9]
    mask = (prompts != PAD).astype(np.int64)
    given = {"input_ids": prompts, "attention_mask": mask, "max_new_tokens": 8}
    free = model.generate(**given, eos_token_id=None).asnumpy()[:, PROMPT.shape[1] :]
    assert free[0].tolist() == GREEDY[:8].tolist() and GREEDY[2] not in free[1]
    for pad, options in ((PAD, {}), (7, {"pad_token_id": 7})):
        out = model.generate(**given, eos_token_id=int(GREEDY[2]), **options).asnumpy()[:, PROMPT.shape[1] :]
        assert out[0].tolist() == [*GREEDY[:3], *[pad] * 5]
        assert np.array_equal(out[1], free[1])


def test_the_context_ends_an_answer_with_a_warning(model, caplog):
    with caplog.at_level(logging.WARNING):
        out = model.generate(input_ids=PROMPT, max_new_tokens=100, eos_token_id=None)
    assert out.shape == (1, CONTEXT + 1)  # the tokens in the cache, and the one that they predict
    assert out.asnumpy()[0, 23:55].tolist() == GREEDY.tolist()
    assert caplog.text.count(f"row 0 reached the context of {CONTEXT} tokens and ends here") == 1
    caplog.clear()
    model.generate(input_ids=PROMPT, max_length=CONTEXT + 1, eos_token_id=None)
    assert not caplog.text


def test_a_longer_prompt_than_the_context_is_an_error_that_says_by_how_much(model):
    with pytest.raises(TooLongError, match=f"80 tokens exceeds the context of {CONTEXT} by 16"):
        model.generate(input_ids=np.ones((1, 80), np.int64), max_new_tokens=1)


# What comes back -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int32, np.int64])
@pytest.mark.parametrize("tensor", [True, False])
def test_ids_come_back_as_they_were_given(model, dtype, tensor):
    ids = PROMPT.astype(dtype)
    out = model.generate(input_ids=ms.Tensor(ids) if tensor else ids, max_new_tokens=2)
    assert isinstance(out, ms.Tensor) and out.asnumpy().dtype == dtype
    assert np.array_equal(out.asnumpy()[:, :-2], ids)


def test_a_dictionary_holds_the_cache_to_go_on_from(model):
    out = model.generate(PROMPT, max_new_tokens=4, eos_token_id=None, return_dict_in_generate=True)
    again = model.generate(
        out.sequences, past_key_values=out.past_key_values, max_new_tokens=4, eos_token_id=None
    )
    assert again.asnumpy()[0, 23:].tolist() == GREEDY[:8].tolist()


def test_text_appears_as_it_is_made(model, tmp_path, capsys):
    tokenizer = TikTokenTokenizer.from_pretrained(published_directory(tmp_path))
    text = tokenizer.decode(GREEDY[:12])
    options = {"max_new_tokens": 12, "eos_token_id": None}
    model.generate(input_ids=PROMPT, streamer=TextStreamer(tokenizer, skip_prompt=True), **options)
    assert capsys.readouterr().out == text + "\n"
    model.generate(input_ids=PROMPT, streamer=TextStreamer(tokenizer), **options)
    assert capsys.readouterr().out == tokenizer.decode(PROMPT[0]) + text + "\n"
    pieces = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=1)
    model.generate(input_ids=PROMPT, streamer=pieces, **options)
    pieces = list(pieces)
    assert len(pieces) > 3 and "".join(pieces) == text
    with pytest.raises(InputError, match="streamer: can show one row, but input_ids has 2"):
        model.generate(np.concatenate((PROMPT, PROMPT)), streamer=TextStreamer(tokenizer))


# Which option counts -------------------------------------------------------------------------------------------------


def settings(base=None, override=None, **options):
    return resolve(base, override, options, default_pad=PAD)


def test_a_call_counts_more_than_its_configuration_and_that_more_than_the_models():
    base = GenerationConfig(temperature=0.5, top_k=5, top_p=0.5, eos_token_id=[3, 4], pad_token_id=2)
    override = GenerationConfig(do_sample=True, temperature=0.6, top_k=6)
    made = settings(base, override, temperature=0.7)
    assert made.sampling == Sampling(do_sample=True, temperature=0.7, top_k=6, top_p=0.5)
    assert (made.eos, made.pad) == ([3, 4], 2)
    assert settings(base, override, eos_token_id=None).eos == []
    assert settings(base, GenerationConfig(eos_token_id=9)).eos == [9]


def test_a_generation_config_is_taken_by_generate(model):
    config = GenerationConfig(max_new_tokens=5, eos_token_id=int(GREEDY[7]))
    assert new_tokens(model, generation_config=config) == GREEDY[:5].tolist()
    assert new_tokens(model, generation_config=config, max_new_tokens=30) == GREEDY[:8].tolist()
    assert new_tokens(model, generation_config={"max_new_tokens": 3}) == GREEDY[:3].tolist()


def test_defaults_are_those_of_transformers():
    made, sampling = settings(), settings(do_sample=True).sampling
    assert not made.sampling.do_sample
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (1.0, 50, 1.0)
    assert (made.eos, made.pad, made.min_new_tokens) == ([], PAD, 0)
    for nothing in (None, 0):
        assert settings(do_sample=True, top_k=nothing).sampling.top_k == 0


@pytest.mark.parametrize(
    ("base", "override", "options", "limit"),
    [
        ({}, {}, {}, 20),
        ({}, {}, {"max_length": 30}, 7),
        ({"max_length": 30}, {}, {}, 7),
        ({}, {"max_length": 30}, {}, 7),
        ({}, {}, {"max_length": 30, "max_new_tokens": 4}, 4),
        ({"max_length": 30}, {"max_new_tokens": 4}, {}, 4),
        ({"max_length": 30, "max_new_tokens": 4}, {}, {}, 4),
        ({"max_new_tokens": 4}, {"max_length": 30}, {}, 7),
        ({"max_new_tokens": 4}, {}, {"max_length": 30}, 7),
        ({"max_new_tokens": 4}, {}, {"max_length": None}, 4),
        ({"max_new_tokens": 4}, {}, {"max_new_tokens": None}, 20),
    ],
)
def test_new_tokens_are_counted_alone_and_a_length_with_the_prompt(base, override, options, limit):
    made = settings(GenerationConfig(**base), GenerationConfig(**override), **options)
    assert made.limit(prompt=23) == limit


def test_a_length_that_the_prompt_has_already_is_an_error():
    with pytest.raises(InputError, match="max_length: 23, but the prompt has 23 tokens already"):
        settings(max_length=23).limit(prompt=23)


def test_a_temperature_of_zero_is_greedy_only_where_nothing_is_sampled(model):
    assert new_tokens(model, temperature=0, max_new_tokens=3, eos_token_id=None) == GREEDY[:3].tolist()
    with pytest.raises(InputError, match="temperature: 0.0, expected a positive number; use do_sample=False"):
        model.generate(PROMPT, do_sample=True, temperature=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 5}, "there is no option 'max_tokens'"),
        ({"num_beams": 4}, "num_beams=4 is not implemented; leave it out"),
        ({"suppress_tokens": [1]}, "suppress_tokens=.1. is not implemented"),
        ({"max_time": 3.0}, "max_time=3.0 is not implemented"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0, expected a positive number"),
        ({"top_p": 1.5}, "top_p: 1.5, expected a number in"),
        ({"top_p": 0.0}, "top_p: 0.0, expected"),
        ({"top_k": -1}, "top_k: -1, expected 0"),
        ({"repetition_penalty": 0.0}, "repetition_penalty: 0.0, expected a positive number"),
    ],
    ids=str,
)
def test_options_that_cannot_be_are_named(options, message):
    with pytest.raises(InputError, match=message):
        settings(**options)
    if "max_tokens" not in options:  # a configuration may hold what is no option at all, as files do
        with pytest.raises(InputError, match=message):
            settings({}, dict(options))
        with pytest.raises(InputError, match=message):
            settings(dict(options))


def test_options_that_ask_for_nothing_are_taken():
    config = GenerationConfig(num_beams=1, use_cache=True, cache_implementation="static", my_own="note")
    made = settings(
        config, None, num_beams=1, num_return_sequences=1, no_repeat_ngram_size=0, use_cache=False
    )
    assert made == settings()
    assert settings(GenerationConfig(num_beams=4), None, num_beams=1) == settings()
