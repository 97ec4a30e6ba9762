"""The tokenizer: a ``tiktoken.model`` vocabulary in the tokenizers library, with tiktoken's results.

tiktoken joins the neighbours whose *joined bytes* have the lowest rank; the library joins *pairs* by their place in a
list. So the list holds, token by token in the order of the ranks, every pair of tokens that joins to it.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import BatchEncoding, PreTrainedTokenizerFast

from .configuration_kimi_vl import model_source

VOCAB_FILE = "tiktoken.model"

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

# Special ids follow the ranks. The published tokenizer names 258 of them, the published models have rows for 256.
SPECIAL_IDS = 256
NAMED_IDS = 258
# Names by distance from the first special id, for a directory whose tokenizer_config.json names none.
PUBLISHED_NAMES = {
    0: "[BOS]",
    1: "[EOS]",
    2: "<|im_end|>",
    3: "<|im_user|>",
    4: "<|im_assistant|>",
    6: "<|start_header_id|>",
    7: "<|end_header_id|>",
    9: "[EOT]",
    10: "<|im_system|>",
    17: "<|im_middle|>",
    18: "<|media_start|>",
    19: "<|media_content|>",
    20: "<|media_end|>",
    21: "<|media_pad|>",
    254: "[UNK]",
    255: "[PAD]",
}

DEFAULT_TOKENS = {"bos_token": "[BOS]", "eos_token": "[EOS]", "pad_token": "[PAD]", "unk_token": "[UNK]"}

# The published tokenizer encodes long text in slices, and token ids depend on where it cuts.
MAX_SLICE = 400_000  # characters
MAX_RUN = 25_000  # characters of one kind (space or not) in a row
_RUN = re.compile(r"\s+|\S+")

DEFAULT_CHAT_TEMPLATE = """\
{%- macro turn(role) -%}
<|im_{{ role }}|>{{ role }}<|im_middle|>
{%- endmacro -%}
{%- if messages[0].role != 'system' -%}
{{ turn('system') }}You are a helpful assistant<|im_end|>
{%- endif -%}
{%- for message in messages -%}
{%- if message.role not in ('system', 'user', 'assistant') -%}
{{ raise_exception("a message has role '" ~ message.role ~ "', expected 'system', 'user' or 'assistant'") }}
{%- endif -%}
{{ turn(message.role) }}
{%- if message.content is string -%}
{{ message.content }}
{%- elif message.content is not defined or message.content is not sequence or message.content is mapping -%}
{{ raise_exception("a message has no content; expected a string or a list of parts") }}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type in ('image', 'image_url') or 'image' in part or 'image_url' in part -%}
<|media_start|>image<|media_content|><|media_pad|><|media_end|>
{%- elif part.text is string -%}
{{ part.text }}
{%- else -%}
{{ raise_exception("a part of a message has type '" ~ part.type ~ "', expected 'text' or 'image'") }}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
<|im_end|>
{%- endfor -%}
{%- if add_generation_prompt -%}
{{ turn('assistant') }}
{%- endif -%}
"""


class VocabularyError(ValueError):
    """A ``tiktoken.model`` or its special tokens that make no tokenizer; the message names the file or token."""


# The library's byte-level models write each byte as one printable character: itself where it is one.
_PRINTED = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_OTHERS = [b for b in range(256) if b not in _PRINTED]
_CHARACTERS = {b: chr(b) if b in _PRINTED else chr(256 + _OTHERS.index(b)) for b in range(256)}


def read_ranks(path: str | os.PathLike) -> dict[str, int]:
    """Tokens of a ``tiktoken.model`` file, each byte written as the library writes it, with their ranks.

    Raises:
        VocabularyError: a line that is not base64 and a rank, a rank twice or missing, or a byte without token.
    """
    ranks: dict[str, int] = {}
    try:
        lines = Path(path).read_bytes().splitlines()
    except OSError as e:
        raise VocabularyError(f"{path}: cannot be read ({e.strerror or e})") from None
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True).decode("latin-1").translate(_CHARACTERS)] = int(rank)
        except ValueError:
            raise VocabularyError(
                f"{path}: line {number} is {line[:60]!r}, expected base64 of a token, a blank and its rank"
            ) from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise VocabularyError(
            f"{path}: has {len(ranks)} tokens, but their ranks are not 0 to {len(ranks) - 1}"
        )
    missing = [b for b, c in _CHARACTERS.items() if c not in ranks]
    if missing:
        raise VocabularyError(
            f"{path}: has no token for byte {missing[0]}, so not every text could be encoded"
        )
    return ranks


def merges_of(ranks: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that joins to a token, in the order of the joined token's rank."""
    merges = []
    for token in sorted(ranks, key=ranks.__getitem__):
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ranks and right in ranks:
                merges.append((left, right))
    return merges


def slices(text: str, specials: re.Pattern[str] | None) -> list[str]:
    """`text` cut where the published tokenizer cuts it: almost always not at all.

    Special tokens are recognised before anything is cut, so what lies between two of them is cut on its own.
    """
    if len(text) <= MAX_RUN:
        return [text]
    cuts = [0]
    marks = [m.span() for m in specials.finditer(text)] if specials else []
    start = 0
    for mark_start, mark_end in [*marks, (len(text), len(text))]:
        for first in range(start, mark_start, MAX_SLICE):
            end = min(first + MAX_SLICE, mark_start)
            if first > start:
                cuts.append(first)
            for run in _RUN.finditer(text, first, end):
                cuts.extend(range(run.start() + MAX_RUN, run.end(), MAX_RUN))
        start = mark_end
    return [text[a:b] for a, b in zip(cuts, [*cuts[1:], len(text)])]


class TikTokenTokenizer(PreTrainedTokenizerFast):
    """The published tokenizer: fast, from its own files, without running code of theirs.

    Args:
        vocab_file: path of ``tiktoken.model``.
        added_tokens_decoder: names of special ids, as ``tokenizer_config.json`` gives them; the others read
            ``<|reserved_token_ID|>``. Without any, the published names at the published distances.
        bos_token, eos_token, pad_token, unk_token: default to ``[BOS]``, ``[EOS]``, ``[PAD]``, ``[UNK]`` where these
            are special tokens.
        chat_template: default: the published one.
        kwargs: what transformers' fast tokenizers take.

    Raises:
        VocabularyError: the file is missing or damaged, or a special token has no id.
    """

    vocab_files_names = {"vocab_file": VOCAB_FILE}
    model_input_names = ["input_ids", "attention_mask"]
    padding_side = "left"  # a batch is continued at its right end

    def __init__(
        self,
        vocab_file: str | os.PathLike | None = None,
        added_tokens_decoder: Mapping[Any, Any] | None = None,
        chat_template: Any = None,
        **kwargs: Any,
    ) -> None:
        if vocab_file is None:
            where = kwargs.get("name_or_path") or "the tokenizer"
            raise VocabularyError(f"{where}: there is no {VOCAB_FILE}; expected a Kimi-VL model directory")
        ranks = read_ranks(vocab_file)
        first = len(ranks)
        names = _special_tokens(first, added_tokens_decoder)
        self._tokenizer = _build(ranks, [names[i] for i in range(first, first + SPECIAL_IDS)])
        # Names whose ids lie beyond the model's embedding.
        self._beyond = {t.content: i for i, t in names.items() if i >= first + SPECIAL_IDS}
        contents = sorted((t.content for t in names.values()), key=len, reverse=True)
        self._specials = re.compile("|".join(map(re.escape, contents)))
        known = {t.content for i, t in names.items() if i < first + SPECIAL_IDS}
        for key, default in DEFAULT_TOKENS.items():
            if default in known:
                kwargs.setdefault(key, default)
        for unused in ("tokenizer_file", "tokenizer_object", "add_bos_token", "add_eos_token"):
            kwargs.pop(unused, None)
        _check_known(kwargs, known, str(vocab_file))
        if chat_template is None:
            chat_template = DEFAULT_CHAT_TEMPLATE
        super().__init__(vocab_file=str(vocab_file), chat_template=chat_template, **kwargs)
        self.vocab_file = str(vocab_file)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, *args: Any, **kwargs: Any
    ) -> Any:  # type: ignore[override]
        """From a model directory, a Hub repo id, or ``nano``."""
        source = model_source(pretrained_model_name_or_path)
        folder = Path(source, kwargs.get("subfolder") or "")
        if folder.is_dir() and not (folder / VOCAB_FILE).is_file():
            raise VocabularyError(f"{folder}: there is no {VOCAB_FILE}; expected a Kimi-VL model directory")
        return super().from_pretrained(source, *args, **kwargs)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """Nothing to convert: the vocabulary file is read by ``__init__``."""
        return kwargs

    @classmethod
    def _patch_mistral_regex(cls, tokenizer: Tokenizer, *args: Any, **kwargs: Any) -> Tokenizer:
        """transformers asks the Hub about every large vocabulary, for the sake of another model family."""
        return tokenizer

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> BatchEncoding:
        # Pairs and texts that are split already are no part of the published use: their length changes nothing.
        texts = [text] if isinstance(text, str) else list(text)
        if (
            text_pair is not None
            or kwargs.get("is_split_into_words")
            or not all(isinstance(t, str) for t in texts)
        ):
            return super()._encode_plus(text, text_pair, *args, **kwargs)
        split = kwargs.get("split_special_tokens")
        specials = None if (self.split_special_tokens if split is None else split) else self._specials
        texts = [_encodable(t) for t in texts]
        if specials:
            self._check_beyond(texts)
        cut = [slices(t, specials) for t in texts]
        if all(len(row) == 1 for row in cut):
            return super()._encode_plus(texts[0] if isinstance(text, str) else texts, None, *args, **kwargs)
        # The library encodes each word of a text that is split already on its own: just what slices are.
        kwargs["is_split_into_words"] = True
        out = super()._encode_plus(cut[0] if isinstance(text, str) else cut, None, *args, **kwargs)
        if kwargs.get("return_offsets_mapping"):
            _shift_offsets(out, cut)
        return out

    def _check_beyond(self, texts: Iterable[str]) -> None:
        for text in texts:
            for name, token_id in self._beyond.items():
                if name not in text:
                    continue
                raise ValueError(
                    f"the text holds {name!r}, whose id {token_id} is outside the vocabulary of {len(self)}; "
                    "remove it, or encode with split_special_tokens=True"
                )

    def decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """The text of ids, or the texts of rows of ids; ids may be arrays or tensors, also within lists.

        Raises:
            ValueError: an id outside the vocabulary.
        """
        return super().decode(_plain(token_ids), *args, **kwargs)

    def _decode(self, token_ids: Any, *args: Any, **kwargs: Any) -> str:
        ids = [token_ids] if isinstance(token_ids, int) else token_ids
        size = len(self)
        for i in ids:
            if not 0 <= i < size:
                raise ValueError(f"token id {i} is outside the vocabulary of {size}")
        return super()._decode(ids, *args, **kwargs)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name_or_path!r}, {self.vocab_size} ranks, {len(self)} ids)"

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copies ``tiktoken.model``."""
        target = Path(save_directory, (f"{filename_prefix}-" if filename_prefix else "") + VOCAB_FILE)
        if not (target.exists() and target.samefile(self.vocab_file)):
            shutil.copyfile(self.vocab_file, target)
        return (str(target),)

    def _save_pretrained(
        self,
        save_directory: str | os.PathLike,
        file_names: tuple[str, ...],
        legacy_format: bool | None = None,
        filename_prefix: str | None = None,
    ) -> tuple[str, ...]:
        """The published layout: ``tiktoken.model``, and the special ids' names in ``tokenizer_config.json``."""
        config = Path(
            save_directory, (f"{filename_prefix}-" if filename_prefix else "") + "tokenizer_config.json"
        )
        values = json.loads(config.read_text(encoding="utf-8"))
        values["added_tokens_decoder"] = {
            str(i): {
                "content": t.content,
                "lstrip": t.lstrip,
                "normalized": t.normalized,
                "rstrip": t.rstrip,
                "single_word": t.single_word,
                "special": t.special,
            }
            for i, t in sorted(self.added_tokens_decoder.items())
            if not t.content.startswith("<|reserved_token_")
        }
        config.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        return (*file_names, *self.save_vocabulary(str(save_directory), filename_prefix))


def _special_tokens(first: int, named: Mapping[Any, Any] | None) -> dict[int, AddedToken]:
    """The special tokens by id, at least NAMED_IDS of them from `first` on."""
    if not named:
        named = {first + i: name for i, name in PUBLISHED_NAMES.items()}
    tokens: dict[int, AddedToken] = {}
    for key, token in named.items():
        if int(key) < first:
            raise VocabularyError(
                f"added_tokens_decoder: id {key} is one of the {first} ids of the vocabulary file"
            )
        if isinstance(token, Mapping):
            token = AddedToken(token["content"], special=token.get("special", True), normalized=False)
        elif not isinstance(token, AddedToken):
            token = AddedToken(str(token), special=True, normalized=False)
        # A special token stands exactly where its name stands, blanks around it untouched.
        tokens[int(key)] = AddedToken(token.content, special=token.special, normalized=False)
    for i in range(first, first + NAMED_IDS):
        tokens.setdefault(i, AddedToken(f"<|reserved_token_{i}|>", special=True, normalized=False))
    contents = [t.content for t in tokens.values()]
    if len(set(contents)) != len(contents):
        twice = next(c for c in contents if contents.count(c) > 1)
        raise VocabularyError(f"added_tokens_decoder: {twice!r} is the name of two ids")
    return tokens


def _build(ranks: dict[str, int], specials: list[AddedToken]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(vocab=ranks, merges=merges_of(ranks), ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(specials)
    return tokenizer


def _check_known(kwargs: Mapping[str, Any], known: set[str], where: str) -> None:
    """Raises VocabularyError for a special token without an id: it would get one that the model has no row for."""
    for key, value in kwargs.items():
        if not key.endswith(("_token", "special_tokens")) or value is None or isinstance(value, bool):
            continue
        if key.endswith("special_tokens"):
            tokens = list(value.values() if isinstance(value, Mapping) else value)
        else:
            tokens = [value]
        for token in tokens:
            content = token["content"] if isinstance(token, Mapping) else str(token)
            if content not in known:
                raise VocabularyError(f"{where}: {key} is {content!r}, which is none of the special tokens")


def _encodable(text: str) -> str:
    """`text` with the halves of surrogate pairs joined, and lone halves replaced, as tiktoken does."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _plain(ids: Any) -> Any:
    """Ids as Python integers in lists."""
    if isinstance(ids, (list, tuple)):
        return [_plain(i) for i in ids]
    return ids.tolist() if hasattr(ids, "tolist") else ids


def _shift_offsets(out: BatchEncoding, cut: list[list[str]]) -> None:
    """Offsets within slices become offsets within the text."""
    starts = [list(accumulate((len(s) for s in row), initial=0)) for row in cut]
    mapping = out["offset_mapping"]
    rows = [mapping] if len(cut) == 1 and mapping and isinstance(mapping[0], tuple) else mapping
    for i, row in enumerate(rows):
        words = out.word_ids(i)
        row[:] = [
            (a, b) if w is None else (starts[i][w] + a, starts[i][w] + b) for (a, b), w in zip(row, words)
        ]
