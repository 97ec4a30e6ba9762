"""``conversion.json``: what a converted directory holds, where it came from, and what the way back needs.

It has no times and no paths of a machine in it: the same checkpoint, converted by the same version with the same
arguments, gives the same bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import blake3

from .errors import ConversionError

MANIFEST = "conversion.json"
FORMAT = "kimi_vl-ckpt"
SCHEMA = 2


def content_hash(data: Any) -> str:
    """BLAKE3 of bytes, in hexadecimal."""
    return blake3.blake3(data).hexdigest()


@dataclass(frozen=True)
class FileRecord:
    """A file that is there besides the shards: copied from the source, or the index."""

    nbytes: int
    hash: str


@dataclass(frozen=True)
class ShardRecord:
    """A weights file; `header_hash` is of what stands in it besides the tensors, which have their own hashes."""

    nbytes: int
    header_hash: str


@dataclass(frozen=True)
class TensorRecord:
    """A tensor of ours: its place (`offset` from the start of the file), its content, and what it was made of."""

    file: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str
    hash: str
    transform: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class DroppedRecord:
    """A published tensor that the network does not read; `data` is its content in hexadecimal, for the way back."""

    reason: str
    data: str


@dataclass(frozen=True)
class PublishedFile:
    """A shard of the source: with its header's text, the way back restores it byte for byte.

    `hash` is BLAKE3 of its first 8 + n bytes and the BLAKE3 of each of its tensors, in the header's order; `sha256` what
    the Hub publishes, and what was checked.
    """

    nbytes: int
    header: str
    hash: str
    sha256: str | None


def file_hash(head: bytes, tensors: Mapping[str, Any], hashes: Mapping[str, str]) -> str:
    """The `hash` of a published file, of the `hashes` of its `tensors`; no file has to be read in its order for it."""
    return content_hash(head + b"".join(bytes.fromhex(hashes[name]) for name in tensors))


@dataclass(frozen=True)
class LossRecord:
    """How many values of a tensor its dtype could not hold: too large (now its largest one), too small (now 0)."""

    overflowed: int
    underflowed: int


@dataclass(frozen=True)
class Manifest:
    """See the module. `files` are those copied from the source; `index` ours; `published_index` the source's text.

    `stored` is the format of the shards, `losses` has the tensors that lost values to a narrower dtype.
    """

    version: str
    source: str
    revision: str | None
    dtype: str
    stored: str
    arguments: dict[str, Any]
    files: dict[str, FileRecord]
    index: FileRecord
    shards: dict[str, ShardRecord]
    tensors: dict[str, TensorRecord]
    losses: dict[str, LossRecord]
    dropped: dict[str, DroppedRecord]
    published_files: dict[str, PublishedFile]
    published_index: str | None

    def to_json(self) -> str:
        return json.dumps({"format": FORMAT, "schema": SCHEMA, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def load(cls, directory: Path) -> Manifest:
        """Raises ConversionError: it is unreadable, damaged, or of another version of this program."""
        path = directory / MANIFEST
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            if raw["format"] != FORMAT or raw["schema"] != SCHEMA:
                raise ConversionError(
                    f"{path}: is {raw['format']!r} with schema {raw['schema']!r}, this version reads {FORMAT!r} "
                    f"with schema {SCHEMA}; convert the checkpoint again"
                )
            for record in raw["dropped"].values():
                bytes.fromhex(record["data"])
            return cls(
                version=_text(raw["version"]),
                source=_text(raw["source"]),
                revision=None if raw["revision"] is None else _text(raw["revision"]),
                dtype=_text(raw["dtype"]),
                stored=_format(raw["stored"]),
                arguments=dict(raw["arguments"]),
                files=_records(FileRecord, raw["files"]),
                index=_record(FileRecord, raw["index"]),
                shards=_records(ShardRecord, raw["shards"]),
                tensors=_records(TensorRecord, raw["tensors"]),
                losses=_records(LossRecord, raw["losses"]),
                dropped=_records(DroppedRecord, raw["dropped"]),
                published_files=_records(PublishedFile, raw["published_files"]),
                published_index=None if raw["published_index"] is None else _text(raw["published_index"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            if isinstance(e, ConversionError):
                raise
            raise ConversionError(
                f"{path}: is damaged ({type(e).__name__}: {e}); convert the checkpoint again"
            ) from None


def plain_name(name: str) -> bool:
    """Whether a name from a checkpoint is a file in the checkpoint's own directory."""
    return name not in ("", ".", "..") and not set(name) & set("/\\\0")


_CHECKS: dict[str, Any] = {
    "int": lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 0,
    "str": lambda v: isinstance(v, str),
    "str | None": lambda v: v is None or isinstance(v, str),
    "tuple[int, ...]": lambda v: isinstance(v, list) and all(map(_CHECKS["int"], v)),
    "tuple[str, ...]": lambda v: isinstance(v, list) and all(map(_CHECKS["str"], v)),
}


def _format(value: Any) -> str:
    if value not in ("safetensors", "ckpt"):
        raise ValueError(f"{value!r} is no format of weights")
    return str(value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no string")
    return value


def _record(cls: Any, raw: Any) -> Any:
    types = {f: cls.__dataclass_fields__[f].type for f in cls.__dataclass_fields__}
    if not isinstance(raw, dict) or set(raw) != set(types):
        raise TypeError(f"expected the fields {', '.join(types)}")
    for field, kind in types.items():
        if not _CHECKS[kind](raw[field]):
            raise TypeError(f"{field} is {raw[field]!r}")
    return cls(**{f: tuple(v) if isinstance(v, list) else v for f, v in raw.items()})


def _records(cls: Any, raw: Any) -> dict[str, Any]:
    if cls in (FileRecord, ShardRecord, PublishedFile):
        bad = [name for name in raw if not plain_name(name)]
        if bad:
            raise TypeError(f"{bad[0]!r} is no plain file name")
    return {name: _record(cls, record) for name, record in raw.items()}
