"""The small files of a published directory, for any configuration.

They are nano's, which are those of the published layout, with the ids of special tokens moved behind the vocabulary.
The vocabulary is made up: bytes, then runs of letters, every one of which two shorter ones join to.
"""

from __future__ import annotations

import base64
import itertools
import json
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kimi_vl
from kimi_vl.convert import ConversionError
from kimi_vl.modeling.configuration import ModelConfig

SPECIAL_IDS = 256  # follow the vocabulary's ranks
MEDIA_PAD = "<|media_pad|>"
IN_TOKEN_LIMIT = 4096


def side_files(raw: Mapping[str, Any], seed: int) -> dict[str, str]:
    """Content by file name; `raw` is the parsed ``config.json``.

    Raises:
        ConversionError: its token ids leave no room for a vocabulary, or are not where the special tokens are.
    """
    config = ModelConfig.from_dict(raw)
    ranks = config.text.vocab_size - SPECIAL_IDS
    if ranks < 256:
        raise ConversionError(
            f"config.json: text_config.vocab_size is {config.text.vocab_size}, expected at least "
            f"{256 + SPECIAL_IDS}: 256 bytes and {SPECIAL_IDS} special tokens"
        )
    tokenizer = _nano("tokenizer_config.json")
    move = ranks - min(map(int, tokenizer["added_tokens_decoder"]))
    special = {int(i) + move: token for i, token in tokenizer["added_tokens_decoder"].items()}
    media = next(i for i, token in special.items() if token["content"] == MEDIA_PAD)
    if config.media_placeholder_token_id != media:
        raise ConversionError(
            f"config.json: media_placeholder_token_id is {config.media_placeholder_token_id}, expected {media}, "
            f"where {MEDIA_PAD} is in a vocabulary of {config.text.vocab_size}"
        )
    tokenizer["added_tokens_decoder"] = {str(i): token for i, token in special.items()}
    tokenizer["model_max_length"] = config.text.max_position_embeddings
    generation = _nano("generation_config.json")
    preprocessor = _nano("preprocessor_config.json") | {
        "in_token_limit": IN_TOKEN_LIMIT,
        "patch_size": config.vision.patch_size,
        "merge_kernel_size": config.vision.merge_kernel_size,
    }
    return {
        "config.json": _json(raw),
        "generation_config.json": _json({key: _moved(ids, move) for key, ids in generation.items()}),
        "preprocessor_config.json": _json(preprocessor),
        "tokenizer_config.json": _json(tokenizer),
        "tiktoken.model": "".join(
            f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(vocabulary(ranks))
        ),
        "README.md": (
            "# A synthetic checkpoint\n\n"
            f"Random weights (seed {seed}) in the file layout of Kimi-VL: {config.text.num_hidden_layers} text "
            f"layers, {config.vision.num_hidden_layers} vision blocks. It is for measuring and testing, and "
            "answers nothing.\n"
        ),
    }


def vocabulary(size: int) -> Iterator[bytes]:
    """`size` different tokens: all bytes, then " a", …, " z", "aa", …, "zz", " aa", …"""
    letters = [letter.encode() for letter in string.ascii_lowercase]
    words = (
        b"".join((first, *rest))
        for length in itertools.count(2)
        for firsts in ([b" "], letters)
        for first, *rest in itertools.product(firsts, *[letters] * (length - 1))
    )
    return itertools.islice(itertools.chain((bytes([b]) for b in range(256)), words), size)


def _nano(name: str) -> dict[str, Any]:
    return json.loads(Path(kimi_vl.nano_path(), name).read_text(encoding="utf-8"))


def _moved(ids: int | list[int], by: int) -> int | list[int]:
    return [i + by for i in ids] if isinstance(ids, list) else ids + by


def _json(value: Any) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
