"""The vocabulary in tiktoken's format, the published chat format, and batches of conversations as arrays."""

from __future__ import annotations

import base64
import random
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from .pictures import LABELS, patches
from .questions import Conversation, fragments

RANKS = 512
SPECIAL_OFFSETS = {  # of the published vocabulary, from its first special id on
    "[BOS]": 0,
    "[EOS]": 1,
    "<|im_end|>": 2,
    "<|im_user|>": 3,
    "<|im_assistant|>": 4,
    "<|start_header_id|>": 6,
    "<|end_header_id|>": 7,
    "[EOT]": 9,
    "<|im_system|>": 10,
    "<|im_middle|>": 17,
    "<|media_start|>": 18,
    "<|media_content|>": 19,
    "<|media_end|>": 20,
    "<|media_pad|>": 21,
    "[UNK]": 254,
    "[PAD]": 255,
}
SPECIAL = {name: RANKS + offset for name, offset in SPECIAL_OFFSETS.items()}
VOCABULARY = RANKS + 256
SYSTEM_PROMPT = "You are a helpful assistant"

SPLIT_PATTERN = "|".join(
    (
        r"[\p{Han}]+",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]+[\p{Ll}\p{Lm}\p{Lo}\p{M}&&[^\p{Han}]]*"
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
_PRINTED_BYTES = (
    *range(33, 127),
    *range(161, 173),
    *range(174, 256),
)  # byte-level BPE writes these as themselves
_BYTE_OF = {chr(b): b for b in _PRINTED_BYTES}
_BYTE_OF |= {chr(256 + i): b for i, b in enumerate(b for b in range(256) if b not in _PRINTED_BYTES)}
_CHAR_OF = {b: c for c, b in _BYTE_OF.items()}

Encode = Callable[[str], tuple[tuple[int, ...], tuple[tuple[int, int], ...]]]
"""Text to token ids and the (start, end) characters of each."""


class TokenLook(NamedTuple):
    """A :class:`questions.Look` in tokens: at `place` of `row`, the next token depends on the media tokens `keys`."""

    row: int
    place: int
    keys: tuple[int, ...]
    counts: bool


class Batch(NamedTuple):
    """Conversations of equal picture size as arrays; `pixels`, `grids`, `labels` are empty without pictures.

    `ids` [B, S] int64, padded at the right; `weights` [B, S] float32, how much the loss looks at each token as a
    target; `pixels` [N, 3, 14, 14]; `grids` [n, 2]; `labels` [N, 3] int64 (see :class:`pictures.Picture`); `looks`
    says where in the row to look when the token after a place is said.
    """

    ids: np.ndarray
    weights: np.ndarray
    pixels: np.ndarray
    grids: np.ndarray
    labels: np.ndarray
    looks: tuple[TokenLook, ...]


def train_vocabulary(path: Path) -> None:
    """Writes a byte-level BPE of `RANKS` ranks, made on the fragments of the questions and answers.

    Fragments, not whole sentences, so that no token crosses from one word into the next, which Chinese sentences
    would bring about; and no digits, so that a number is one token per digit.
    """
    in_every_chat = ("system", "user", "assistant", "image", *re.findall(" ?[^ ]+", SYSTEM_PROMPT))
    texts = ["".join(c for c in text if not c.isdigit()) for text in (*fragments(), *in_every_chat * 20)]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=RANKS, initial_alphabet=alphabet, show_progress=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = _splitter()
    tokenizer.train_from_iterator(texts, trainer)
    ranked = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if len(ranked) != RANKS:
        raise ValueError(f"the texts give {len(ranked)} ranks, expected {RANKS}; add texts")
    lines = (
        f"{base64.b64encode(bytes(_BYTE_OF[c] for c in token)).decode()} {rank}\n" for token, rank in ranked
    )
    path.write_text("".join(lines))


def load_vocabulary(path: Path) -> Encode:
    """The encoder of a file in tiktoken's format."""
    ranks = {}
    for line in path.read_text().splitlines():
        token, rank = line.split()
        ranks["".join(_CHAR_OF[b] for b in base64.b64decode(token))] = int(rank)
    merges = [_last_merge(token, ranks) for token in sorted(ranks, key=ranks.__getitem__) if len(token) > 1]
    tokenizer = Tokenizer(models.BPE(vocab=ranks, merges=merges))
    tokenizer.pre_tokenizer = _splitter()

    @lru_cache(maxsize=100_000)
    def encode(text: str) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
        encoding = tokenizer.encode(text)
        return tuple(encoding.ids), tuple(encoding.offsets)

    return encode


def encode_chat(
    encode: Encode, conversation: Conversation, telling_weight: float = 1.0, row: int = 0
) -> tuple[list[int], list[float], list[TokenLook]]:
    """Token ids in the published chat format, per token its weight as a target, and the looks of row `row`.

    Answers and their end marks weigh 1, `telling_weight` in their telling parts; all else weighs 0.
    """
    s = SPECIAL
    ids = [s["<|im_system|>"], *encode("system")[0], s["<|im_middle|>"]]
    ids += [*encode(SYSTEM_PROMPT)[0], s["<|im_end|>"]]
    weights = [0.0] * len(ids)
    looks: list[TokenLook] = []
    first_media: list[int] = []
    for i, turn in enumerate(conversation.turns):
        ids += [s["<|im_user|>"], *encode("user")[0], s["<|im_middle|>"]]
        for picture in conversation.pictures if i == 0 else ():
            n = picture.labels.shape[0] * picture.labels.shape[1] // 4
            ids += [s["<|media_start|>"], *encode("image")[0], s["<|media_content|>"]]
            first_media.append(len(ids))
            ids += [s["<|media_pad|>"]] * n + [s["<|media_end|>"]]
        ids += [*encode(turn.question)[0], s["<|im_end|>"]]
        ids += [s["<|im_assistant|>"], *encode("assistant")[0], s["<|im_middle|>"]]
        weights += [0.0] * (len(ids) - len(weights))
        answer, offsets = encode(turn.answer)
        for look in turn.looks:
            columns = conversation.pictures[look.picture].labels.shape[1] // 2
            keys = tuple(first_media[look.picture] + i * columns + j for i, j in look.cells)
            token = next(k for k, (_, end) in enumerate(offsets) if look.at < end)
            looks.append(TokenLook(row, len(ids) + token - 1, keys, look.counts))
        start, end = turn.telling
        ids += [*answer, s["<|im_end|>"]]
        weights += [telling_weight if a < end and b > start else 1.0 for a, b in offsets] + [1.0]
    return ids, weights, looks


def make_batch(encode: Encode, conversations: Sequence[Conversation], telling_weight: float = 1.0) -> Batch:
    """Padding at the right is harmless under causal attention, so a batch needs no mask."""
    chats = [encode_chat(encode, c, telling_weight, row) for row, c in enumerate(conversations)]
    longest = max(len(ids) for ids, _, _ in chats)
    ids = np.full((len(chats), longest), SPECIAL["[PAD]"], np.int64)
    weights = np.zeros((len(chats), longest), np.float32)
    for row, (chat_ids, chat_weights, _) in enumerate(chats):
        ids[row, : len(chat_ids)] = chat_ids
        weights[row, : len(chat_ids)] = chat_weights
    pictures = [picture for conversation in conversations for picture in conversation.pictures]
    pixels = [np.zeros((0, 3, 14, 14), np.float32), *(patches(picture) for picture in pictures)]
    labels = [np.zeros((0, len(LABELS)), np.int64), *(p.labels.reshape(-1, len(LABELS)) for p in pictures)]
    grids = np.array([picture.labels.shape[:2] for picture in pictures], np.int64).reshape(-1, 2)
    looks = tuple(look for _, _, of_chat in chats for look in of_chat)
    return Batch(ids, weights, np.concatenate(pixels), grids, np.concatenate(labels), looks)


def generator(*words: object) -> random.Random:
    """A random generator of its own for every sequence of words, the same on every machine."""
    return random.Random(" ".join(map(str, words)))


def _splitter() -> pre_tokenizers.PreTokenizer:
    split = pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def _last_merge(token: str, ranks: dict[str, int]) -> tuple[str, str]:
    """The two parts that are left of `token` when only lower ranks may be merged."""
    parts = list(token)
    while len(parts) > 2:
        joined = [ranks.get(a + b, RANKS) for a, b in zip(parts, parts[1:])]
        i = joined.index(min(joined))
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]
