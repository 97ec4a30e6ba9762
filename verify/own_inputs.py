"""A user's own prompts and pictures as cases: the files of one directory.

`NAME.txt` is a question, put through the chat template of the reference's processor after the pictures that are called
after it: `NAME.png`, then `NAME-1.png`, `NAME-2.png` and so on. `NAME.json` is a conversation as `apply_chat_template`
takes it, a list of messages whose pictures are named by file: `{"type": "image", "image": "FILE"}`. Everything else in
the directory is left alone, but for pictures that no prompt uses: those are probably misnamed.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..modeling.configuration import ModelConfig
from .cases import GROUPS, OWN, CaseError, Limits, Plan, Row, Source, suite
from .judge import SUITE as WHOLE
from .prompts import conversation_inputs, has_processor

PICTURES = (".png", ".jpg", ".jpeg", ".webp")
NEW_TOKENS = 32  # greedy, or as many as fit

Message = dict[str, Any]


@dataclass(frozen=True)
class OwnRow(Row):
    """A conversation that is there already, and the files of its pictures in their order."""

    path: Path = Path()
    messages: tuple[Message, ...] = ()
    pictures: tuple[Path, ...] = ()


@dataclass(frozen=True)
class OwnInputs:
    """`plans` and the `rows` they are of, by name; `files` is size and SHA-256 of each file used, by its name."""

    plans: list[Plan]
    rows: list[OwnRow]
    files: dict[str, dict[str, Any]]


def read_inputs(directory: Path, reference: Path) -> OwnInputs:
    """The prompts of a directory; what they come to in tokens, :class:`OwnSource` says.

    Args:
        reference: the directory whose processor will make them into tokens.

    Raises:
        CaseError: there is no processor, or no prompt, or one that is not in the form above; one sentence says which.
        ConfigError: the reference's configuration is not Kimi-VL's.
    """
    if not has_processor(reference):
        raise CaseError(
            f"--inputs: {reference} has no processor (tiktoken.model, tokenizer_config.json), which own prompts are made with"
        )
    if not directory.is_dir():
        raise CaseError(
            f"--inputs: {directory} is not a directory; give one that holds NAME.txt or NAME.json"
        )
    names = (plan.name for plan in suite(ModelConfig.from_file(reference), Limits()))
    taken = {*names, *GROUPS, OWN, WHOLE}
    prompts: dict[str, Path] = {}
    pictures: dict[str, list[Path]] = {}  # by stem
    for path in sorted(directory.iterdir()):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix in (".txt", ".json"):
            if path.stem in prompts:
                raise CaseError(
                    f"{path}: there is {prompts[path.stem].name} too; rename one, a case has one prompt"
                )
            if path.stem in taken:
                raise CaseError(
                    f"{path}: {path.stem!r} is the name of a case or group of the suite; rename the file"
                )
            prompts[path.stem] = path
        elif path.suffix.lower() in PICTURES:
            pictures.setdefault(path.stem, []).append(path)
    if not prompts:
        raise CaseError(f"--inputs: {directory} holds neither a NAME.txt nor a NAME.json")
    rows = {
        name: _question(path, _called_after(name, pictures, prompts))
        if path.suffix == ".txt"
        else _conversation(path)
        for name, path in prompts.items()
    }
    used = {picture for row in rows.values() for picture in row.pictures}
    for path in sorted(p for of_stem in pictures.values() for p in of_stem):
        if path not in used:
            raise CaseError(
                f"{path}: belongs to no prompt; call it after one, as in NAME.png or NAME-1.png, or remove it"
            )
    plans = [
        Plan(name, _what(prompts[name], row), (row,), new_tokens=NEW_TOKENS, own=True)
        for name, row in rows.items()
    ]
    return OwnInputs(
        plans, list(rows.values()), {p.name: _hashed(p) for p in sorted({*prompts.values(), *used})}
    )


def _called_after(name: str, pictures: dict[str, list[Path]], prompts: dict[str, Path]) -> tuple[Path, ...]:
    """NAME.png, then NAME-1.png, NAME-2.png, ... without a gap."""
    numbers = [
        int(stem[len(name) + 1 :]) for stem in pictures if re.fullmatch(re.escape(name) + r"-[1-9]\d*", stem)
    ]
    numbers = sorted(n for n in numbers if f"{name}-{n}" not in prompts)
    for expected, n in enumerate(numbers, 1):
        if n != expected:
            raise CaseError(
                f"{prompts[name]}: there is a picture {name}-{n}, but no {name}-{expected}; number them from 1"
            )
    found = []
    for stem in (name, *(f"{name}-{n}" for n in numbers)):
        first, *more = pictures.get(stem, [None])
        if more:
            raise CaseError(f"{more[0]}: there is {first and first.name} too; number them {name}-1, {name}-2")
        found += [first] if first else []
    return tuple(found)


def _question(path: Path, pictures: tuple[Path, ...]) -> OwnRow:
    text = _read(path).rstrip("\r\n")
    if not text.strip():
        raise CaseError(f"{path}: is empty; write the prompt into it")
    parts = [*({"type": "image"} for _ in pictures), {"type": "text", "text": text}]
    return OwnRow(path=path, messages=({"role": "user", "content": parts},), pictures=pictures)


def _conversation(path: Path) -> OwnRow:
    try:
        messages = json.loads(_read(path))
    except ValueError as e:
        raise CaseError(f"{path}: is not valid JSON ({e})") from None
    if not isinstance(messages, list) or not messages:
        raise CaseError(f"{path}: holds no list of messages, as apply_chat_template takes it")
    pictures: list[Path] = []
    for n, message in enumerate(messages, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise CaseError(f'{path}: message {n} is no {{"role": ..., "content": ...}}')
        content = message.get("content")
        for part in content if isinstance(content, list) else [{"type": "text", "text": content}]:
            kind = part.get("type") if isinstance(part, dict) else None
            value = part.get(kind) if kind in ("text", "image") else None
            if not isinstance(value, str):
                raise CaseError(
                    f'{path}: message {n} has content other than text, {{"type": "text", "text": ...}} and '
                    '{"type": "image", "image": FILE}'
                )
            if kind == "image":
                pictures.append(_named(path, value))
    return OwnRow(path=path, messages=tuple(messages), pictures=tuple(pictures))


def _named(path: Path, name: str) -> Path:
    """A picture that a conversation names, which lies beside it."""
    if Path(name).name != name:
        raise CaseError(
            f"{path}: names the picture {name!r}; expected the name of a file beside it, without a path"
        )
    picture = path.parent / name
    if not picture.is_file():
        raise CaseError(f"{path}: names the picture {name!r}, which is not in {path.parent}")
    return picture


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise CaseError(f"{path}: is not UTF-8 text") from None


def _what(path: Path, row: OwnRow) -> str:
    turns, n = len(row.messages), len(row.pictures)
    what = (
        f"own prompt {path.name}"
        if path.suffix == ".txt"
        else f"own conversation {path.name}, {turns} messages"
    )
    return what + (f", {n} picture{'s' if n > 1 else ''}" if n else "")


def _hashed(path: Path) -> dict[str, Any]:
    content = path.read_bytes()
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


class OwnSource:
    """Own prompts as the reference's processor makes them; all others are the suite's.

    Raises:
        CaseError: a picture cannot be read, or the processor refuses a prompt. Nothing has run yet.
    """

    def __init__(self, others: Source, own: OwnInputs, reference: Path):
        from ..modeling.processing import KimiVLProcessor

        self.others, self.kind = others, others.kind
        processor = KimiVLProcessor.from_pretrained(reference)  # scales pictures to its own limit
        self.made: dict[Path, tuple[str, dict[str, np.ndarray]]] = {}
        for row in own.rows:
            try:
                self.made[row.path] = conversation_inputs(processor, list(row.messages), list(row.pictures))
            except ValueError as e:
                raise CaseError(f"{row.path}: {e}") from None

    def inputs(
        self, rows: tuple[Row, ...], rng: np.random.Generator
    ) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
        row = rows[0]
        if not isinstance(row, OwnRow):
            return self.others.inputs(rows, rng)
        text, made = self.made[row.path]
        return made, (text,)
