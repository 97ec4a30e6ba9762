"""The tokenizer: tiktoken's ids, the published special tokens and slices, and the files it reads and writes."""

from __future__ import annotations

import base64
import copy
import hashlib
import json
import pickle
import random
import time

import numpy as np
import pytest
import tiktoken
from published import CASES, TOKENIZER, named_specials, published_directory, tokenizer_config
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from kimi_vl import TikTokenTokenizer
from kimi_vl.modeling.tokenization import (
    _CHARACTERS,
    NAMED_IDS,
    SPLIT_PATTERN,
    VocabularyError,
    merges_of,
    read_ranks,
    slices,
)

MERGES = 20_000
SCRIPTS = {  # first and last letter; how long words are
    "latin": ("a", "z", 9),
    "accented": ("à", "ÿ", 5),
    "cyrillic": ("а", "я", 8),
    "greek": ("α", "ω", 7),
    "arabic": ("ب", "ي", 6),
    "hebrew": ("א", "ת", 5),
    "devanagari": ("अ", "ह", 5),
    "thai": ("ก", "ฮ", 8),
    "hiragana": ("ぁ", "ん", 6),
    "hangul": ("가", "나", 4),
    "han": ("一", "丁", 3),
}
EMOJI = ["😀", "👍🏽", "👨‍👩‍👧", "🇫🇷", "❤️", "🏴‍☠️"]
CODE = [
    "def f(x):\n    return x+1\n",
    "for (int i=0;i<10;i++) {\r\n\t}",
    "<div class='a'>&nbsp;</div>",
    "a->b::c[0]",
]
BLANKS = [" ", "  ", "\t", "\n", "\r\n", "\n\n \n", "\u00a0", "\u3000", "   \t", "\u2028", "\x0b", "\x85"]
LOOKALIKES = [
    "<|im_end|",
    "<|media_pad |>",
    "[EOS",
    "<|im_end|>",
    "[BOS]",
    "<|media_pad|>",
    "<|reserved_token_1|>",
]


def words_of(rng: random.Random) -> list[str]:
    words = []
    for first, last, length in SCRIPTS.values():
        letters = [chr(c) for c in range(ord(first), ord(last) + 1)]
        for _ in range(1200):
            word = "".join(rng.choice(letters) for _ in range(rng.randint(1, length)))
            words.append(rng.choice((word, word, word.title(), word.upper())))
    return words


def texts(number: int, seed: int, words: list[str]) -> list[str]:
    """Mixtures of everything that a split pattern treats differently."""
    rng = random.Random(seed)
    kinds = [
        lambda: rng.choice(words),
        lambda: rng.choice(words) + rng.choice(["'s", "'RE", "’s", "'LL", "'d"]),
        lambda: str(rng.randrange(10 ** rng.randint(1, 9))),
        lambda: rng.choice(EMOJI + CODE + LOOKALIKES),
        lambda: rng.choice(BLANKS) * rng.randint(1, 4),
        lambda: rng.choice(["...", "!?", "--", "_", "#", "«»", "。", "，", "٣٤", "½", "①", "e\u0301"]),
        lambda: chr(rng.choice([rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x30000)])),
    ]
    weights = [10, 1, 2, 1, 3, 3, 1]
    glue = ["", "", " ", " "]
    return [
        "".join(rng.choices(kinds, weights)[0]() + rng.choice(glue) for _ in range(rng.randint(0, 40)))
        for _ in range(number)
    ]


def write_vocabulary(path, tokens: list[bytes]) -> None:
    path.write_text("".join(f"{base64.b64encode(t).decode()} {rank}\n" for rank, t in enumerate(tokens)))


@pytest.fixture(scope="module")
def words():
    return words_of(random.Random(0))


@pytest.fixture(scope="module")
def vocabulary(words, tmp_path_factory):
    """A tiktoken.model of at least MERGES merges, trained on generated text."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=256 + MERGES, initial_alphabet=alphabet, show_progress=False)
    trained.train_from_iterator([" ".join(words), *texts(3000, 1, words)], trainer)
    byte_of = {c: b for b, c in _CHARACTERS.items()}
    ranked = sorted(trained.get_vocab().items(), key=lambda item: item[1])
    path = tmp_path_factory.mktemp("vocabulary") / "tiktoken.model"
    write_vocabulary(path, [bytes(byte_of[c] for c in token) for token, _ in ranked])
    return path


def tiktoken_of(path, tokenizer: TikTokenTokenizer) -> tiktoken.Encoding:
    """The same vocabulary in tiktoken itself."""
    lines = (line.split() for line in path.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    specials = {t.content: i for i, t in tokenizer.added_tokens_decoder.items()}
    return tiktoken.Encoding(
        "reference", pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens=specials
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return TikTokenTokenizer.from_pretrained(published_directory(tmp_path_factory.mktemp("model")))


def test_ids_equal_tiktokens_on_a_large_vocabulary(vocabulary, words):
    tokenizer = TikTokenTokenizer(vocabulary)
    assert tokenizer.vocab_size >= 256 + MERGES
    reference = tiktoken_of(vocabulary, tokenizer)
    samples = [t for t in texts(1500, 2, words) if t] + words[:200]
    used: set[int] = set()
    for text, ids in zip(samples, tokenizer(samples)["input_ids"]):
        assert ids == reference.encode(text, allowed_special="all"), text
        assert tokenizer.decode(ids) == text
        used.update(ids)
    plain = tokenizer(samples, split_special_tokens=True)["input_ids"]
    assert plain == [reference.encode(t, disallowed_special=()) for t in samples]
    assert len(samples) >= 1000
    assert sum(i >= 256 for i in used) > 5000  # it is merges that were compared


@pytest.mark.parametrize("in_order", [True, False], ids=["trained order", "any order"])
def test_ids_equal_tiktokens_on_vocabularies_that_no_training_gives(in_order, tmp_path):
    """Ranks in any order, tokens that no pair of tokens joins to, tokens with several pairs: joined bytes decide."""
    for seed in range(8):
        rng = random.Random(seed)
        letters = [b"a", b"b", b"c", b" ", "é".encode()]
        made: list[bytes] = []
        while len(made) < 150:
            pool = letters + made
            token = b"".join(rng.choice(pool) for _ in range(rng.choice((2, 2, 3))))
            if len(token) <= 12 and token not in pool:
                made.append(token)
        if not in_order:
            rng.shuffle(made)
        path = tmp_path / f"{seed}.model"
        singles = [bytes([b]) for b in range(256)]
        write_vocabulary(path, singles + [t for t in made if t not in singles])
        tokenizer = TikTokenTokenizer(path)
        reference = tiktoken_of(path, tokenizer)
        for _ in range(100):
            text = "".join(rng.choice("abc é") for _ in range(rng.randint(1, 80)))
            assert tokenizer.encode(text) == reference.encode(text), (seed, text)


@pytest.mark.parametrize("text", ["\ud83d\ude00", "a\ud83d", "\ude00\ud83d b"])
def test_halves_of_surrogate_pairs_are_what_tiktoken_makes_of_them(tokenizer, text):
    assert tokenizer.encode(text) == tiktoken_of(TOKENIZER / "tiktoken.model", tokenizer).encode(text)


@pytest.mark.parametrize("case", CASES["text"], ids=lambda c: repr(c["text"][:20]))
def test_golden_texts(tokenizer, case):
    assert tokenizer.encode(case["text"]) == case["ids"]
    assert tokenizer(case["text"], split_special_tokens=True)["input_ids"] == case["ids_special_as_text"]
    assert tokenizer.decode(case["ids"]) == case["text"]


@pytest.mark.parametrize("case", CASES["long"], ids=lambda c: repr(c["unit"]))
def test_golden_long_texts(tokenizer, case):
    text = case["unit"] * case["times"]
    ids = tokenizer.encode(text)
    assert len(ids) == case["count"]
    assert hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest() == case["sha256_of_ids_as_int32"]
    assert (ids == tiktoken_of(TOKENIZER / "tiktoken.model", tokenizer).encode(text)) == case[
        "one_piece_gives_the_same"
    ]
    assert tokenizer.decode(ids) == text


def published_slices(text: str) -> list[str]:
    """Character by character, for text without special tokens."""
    found = []
    for first in range(0, len(text), 400_000):
        chunk = text[first : first + 400_000]
        start = length = 0
        for i, c in enumerate(chunk):
            length = length + 1 if i and c.isspace() == chunk[i - 1].isspace() else 1
            if length > 25_000:
                found.append(chunk[start:i])
                start, length = i, 1
        found.append(chunk[start:])
    return found


def long_texts() -> dict[str, str]:
    rng = random.Random(3)
    runs = [
        rng.choice(["x", "字", " ", "\u3000", "\n"]) * rng.choice([5, 24_999, 25_000, 25_001, 60_000])
        for _ in range(12)
    ]
    return {
        "just short enough": "x" * 25_000,
        "one too many": "x" * 25_001,
        "several cuts": "ab" * 45_000,
        "blanks": "a" + " \n" * 30_000 + "b",
        "runs": "".join(runs),
        "chunks": "word " * 170_000,
        "a run over a chunk": "word " * 78_000 + "y" * 60_000,
    }


@pytest.mark.parametrize("name", long_texts())
def test_long_text_is_cut_where_the_published_tokenizer_cuts_it(tokenizer, name):
    text = long_texts()[name]
    want = published_slices(text)
    assert slices(text, None) == slices(text, tokenizer._specials) == want
    if len(text) < 100_000:  # tiktoken takes long for one long word
        reference = tiktoken_of(TOKENIZER / "tiktoken.model", tokenizer)
        assert tokenizer.encode(text) == [i for part in want for i in reference.encode(part)]


def test_special_tokens_are_recognised_before_long_text_is_cut(tokenizer):
    pad = "<|media_pad|>"
    image, text = pad * 4096, "x" * 30_000  # 53,248 characters without a blank, but none of them is text
    prompt = f"{text}{image}{text}"
    want = tokenizer.encode(text) + [tokenizer.convert_tokens_to_ids(pad)] * 4096 + tokenizer.encode(text)
    assert tokenizer.encode(prompt) == want
    short = tokenizer(["a", prompt, ""], padding=True, return_tensors="np")
    assert short["input_ids"].shape == (3, len(want))
    assert short["attention_mask"].sum(axis=1).tolist() == [1, len(want), 0]


def test_offsets_of_long_text(tokenizer):
    text = "ab " * 10 + "x" * 60_000 + " end"
    for given in (text, ["short", text]):
        out = tokenizer(given, return_offsets_mapping=True)
        offsets = out["offset_mapping"] if isinstance(given, str) else out["offset_mapping"][1]
        assert offsets[0][0] == 0 and offsets[-1][1] == len(text)
        assert all(a[1] == b[0] for a, b in zip(offsets, offsets[1:]))


def test_truncation_and_padding_of_long_text(tokenizer):
    text = "the" * 9000
    ids = tokenizer.encode(text)
    assert tokenizer(text, truncation=True, max_length=100)["input_ids"] == ids[:100]
    out = tokenizer(["a", text], truncation=True, max_length=100, padding=True)
    assert out["input_ids"] == [[999] * 99 + tokenizer.encode("a"), ids[:100]]


def test_special_ids_have_the_names_of_the_directory(tokenizer):
    assert {t.content: i for i, t in tokenizer.added_tokens_decoder.items()} == CASES["special"]
    assert len(tokenizer) == 1000 and tokenizer.vocab_size == 744
    for name, i in named_specials().items():
        assert tokenizer.convert_tokens_to_ids(name) == i
        assert tokenizer.convert_ids_to_tokens(i) == name
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (744, 745, 999)
    assert tokenizer.padding_side == "left"


def test_a_directory_may_name_special_ids_as_it_likes(tmp_path):
    names = {744: "<start>", 745: "<stop>", 760: {"content": "<tool>", "special": False}, 999: "<fill>"}
    tokenizer = TikTokenTokenizer(
        TOKENIZER / "tiktoken.model", names, bos_token="<start>", eos_token="<stop>", pad_token="<fill>"
    )
    assert tokenizer.encode("<start>a<tool><|reserved_token_746|>") == [744, 97, 760, 746]
    assert tokenizer.decode([744, 97, 760, 746], skip_special_tokens=True) == "a<tool>"
    assert tokenizer.unk_token is None
    tokenizer.save_pretrained(tmp_path)
    assert TikTokenTokenizer.from_pretrained(tmp_path).get_vocab() == tokenizer.get_vocab()


def test_without_names_the_published_ones_hold():
    tokenizer = TikTokenTokenizer(TOKENIZER / "tiktoken.model")
    assert {t.content: i for i, t in tokenizer.added_tokens_decoder.items()} == CASES["special"]


@pytest.mark.parametrize("token_id", [1000, 1001, -1, 10**9])
def test_an_id_outside_the_vocabulary_cannot_be_decoded(tokenizer, token_id):
    with pytest.raises(ValueError, match=f"token id {token_id} is outside the vocabulary of 1000"):
        tokenizer.decode([97, token_id])


def test_ids_without_a_row_in_the_model_are_never_given(tokenizer):
    """The published tokenizer names two more ids than the model has rows for."""
    assert NAMED_IDS == 258
    for i in (1000, 1001):
        with pytest.raises(ValueError, match=f"whose id {i} is outside the vocabulary of 1000"):
            tokenizer(["fine", f"a <|reserved_token_{i}|> b"])
    text = "<|reserved_token_1000|><|reserved_token_1002|>"
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert max(ids) < 744 and tokenizer.decode(ids) == text
    assert max(tokenizer.encode("<|reserved_token_1002|>")) < 744  # no name at all


def test_partial_characters_decode_to_replacement_characters(tokenizer):
    ids = tokenizer.encode("😀")
    text = tokenizer.decode(ids[:-1])
    assert text == b"\xf0\x9f\x98".decode(errors="replace") or set(text) == {"\ufffd"}
    assert "\ufffd" in text
    byte = tokenizer.convert_tokens_to_ids(_CHARACTERS[0xFF])
    assert tokenizer.decode([97, byte, 97]) == "a\ufffda"


def test_decoding_takes_what_generate_gives(tokenizer):
    import mindspore as ms

    ids = tokenizer.encode("Hello, world!<|im_end|>")
    forms = [ids, np.array(ids), ms.Tensor(ids, ms.int32), tuple(ids)]
    for form in forms:
        assert tokenizer.decode(form, skip_special_tokens=True) == "Hello, world!"
    assert tokenizer.decode(ids) == "Hello, world!<|im_end|>"
    for rows in (
        [ids, ids[:2]],
        np.array([ids, ids]),
        [np.array(ids), ms.Tensor(ids)],
        ms.Tensor([ids, ids]),
    ):
        texts = tokenizer.batch_decode(rows, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert len(texts) == 2 and texts[0] == "Hello, world!"
    assert tokenizer.decode(ids[0]) == "H"


def test_streaming_prints_whole_characters(tokenizer, capsys):
    from transformers import TextStreamer

    text = "Hi 请描述 😀 done.\n"
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    for i in tokenizer.encode(text + "<|im_end|>"):
        streamer.put(np.array([i]))
    streamer.end()
    assert capsys.readouterr().out == text + "\n"


def test_saving_gives_the_published_layout_and_loading_it_the_same_tokenizer(tokenizer, tmp_path):
    files = tokenizer.save_pretrained(tmp_path)
    assert (tmp_path / "tiktoken.model").read_bytes() == (TOKENIZER / "tiktoken.model").read_bytes()
    assert str(tmp_path / "tiktoken.model") in files
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert saved["added_tokens_decoder"] == tokenizer_config()["added_tokens_decoder"]
    assert saved["tokenizer_class"] == "TikTokenTokenizer"
    again = TikTokenTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    assert again.special_tokens_map == tokenizer.special_tokens_map
    assert again.chat_template == tokenizer.chat_template
    assert (again.model_max_length, again.padding_side) == (1048576, "left")
    again.save_pretrained(tmp_path)  # onto its own files
    assert TikTokenTokenizer.from_pretrained(tmp_path).encode("<|im_end|>") == [746]


def test_copies_and_pickles(tokenizer):
    for other in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert other.encode("a <|im_end|> 请") == tokenizer.encode("a <|im_end|> 请")
        with pytest.raises(ValueError, match="outside the vocabulary"):
            other.encode("<|reserved_token_1000|>")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines[:5] + ["not base64! 5"] + lines[6:], "line 6 is b'not base64! 5'"),
        (lambda lines: lines[:5] + [lines[5].split()[0]] + lines[6:], "line 6"),
        (lambda lines: lines[:5] + [lines[5].split()[0] + " five"] + lines[6:], "line 6"),
        (lambda lines: lines[:-2] + lines[-1:], "ranks are not 0 to 742"),
        (lambda lines: [*lines, lines[-1]][:0], "has no token for byte 0"),
        (lambda lines: lines[1:] + [f"{base64.b64encode(b'zzzz').decode()} 0"], "has no token for byte"),
    ],
)
def test_a_damaged_vocabulary_is_refused(change, message, tmp_path):
    path = tmp_path / "tiktoken.model"
    lines = (TOKENIZER / "tiktoken.model").read_text().splitlines()
    path.write_text("\n".join(change(lines)) + "\n")
    with pytest.raises(VocabularyError, match=message) as e:
        TikTokenTokenizer(path)
    assert str(path) in str(e.value) and "\n" not in str(e.value)


def test_missing_files_are_named(tmp_path):
    with pytest.raises(VocabularyError, match="there is no tiktoken.model"):
        TikTokenTokenizer.from_pretrained(tmp_path)
    with pytest.raises(VocabularyError, match=r"nowhere\.model: cannot be read"):
        TikTokenTokenizer("nowhere.model")


@pytest.mark.parametrize(
    ("names", "more", "message"),
    [
        ({5: "<x>"}, {}, "id 5 is one of the 744 ids"),
        ({744: "<x>", 745: "<x>"}, {}, "'<x>' is the name of two ids"),
        (None, {"pad_token": "<pad>"}, "pad_token is '<pad>', which is none of the special tokens"),
        (None, {"additional_special_tokens": ["[BOS]", "<new>"]}, "'<new>', which is none"),
    ],
)
def test_special_tokens_that_make_no_sense_are_refused(names, more, message):
    with pytest.raises(VocabularyError, match=message):
        TikTokenTokenizer(TOKENIZER / "tiktoken.model", names, **more)


@pytest.mark.slow
def test_a_vocabulary_of_the_published_size_loads_in_seconds(tmp_path):
    rng = random.Random(0)
    tokens = [bytes([b]) for b in range(256)]
    known = set(tokens)
    while len(tokens) < 163_584:
        token = rng.choice(tokens) + rng.choice(tokens)
        if len(token) <= 16 and token not in known:
            known.add(token)
            tokens.append(token)
    write_vocabulary(tmp_path / "tiktoken.model", tokens)
    start = time.process_time()
    tokenizer = TikTokenTokenizer.from_pretrained(tmp_path)
    assert time.process_time() - start < 20  # a few seconds; the bound is for a crowded machine
    assert (len(tokenizer), tokenizer.pad_token_id) == (163_840, 163_839)
    assert tokenizer.convert_tokens_to_ids("<|media_pad|>") == 163_605


def test_merges_are_all_pairs_in_the_order_of_ranks():
    ranks = read_ranks(TOKENIZER / "tiktoken.model")
    merges = merges_of(ranks)
    joined = [ranks[a + b] for a, b in merges]
    assert joined == sorted(joined)
    assert len(set(merges)) == len(merges)
