"""Reading safetensors files that nobody vouches for.

The format: eight bytes header length n (little endian), n bytes of JSON, then the tensors' bytes without holes. A
header is data from a stranger: every number is checked against the file before anything is read by it.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..modeling.configuration import short
from .errors import ConversionError
from .mapped_file import MappedFile, TensorInfo

MAX_RANK = 8
MAX_HEADER_BYTES = 4 << 20  # the published checkpoint needs 0.8 MB for all its shards together

DTYPES: dict[str, np.dtype] = {
    "BOOL": np.dtype(np.bool_),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "F32": np.dtype(np.float32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F64": np.dtype(np.float64),
}
CODES = {dtype.name: code for code, dtype in DTYPES.items()}


def parse_header(head: bytes, file_bytes: int, name: str) -> dict[str, TensorInfo]:
    """The tensors of a file whose first bytes are `head`, in the header's order.

    Args:
        head: the length field and the header, 8 + n bytes.
        file_bytes: the whole file's size.
        name: the file's, for errors.

    Raises:
        ConversionError: the header is no safetensors header, or contradicts itself or the file's size.
    """
    try:
        header = strict_json(head[8:].decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise ConversionError(f"{name}: its header is no valid JSON ({e}); download the file again") from None
    if not isinstance(header, dict):
        raise ConversionError(f"{name}: its header is not a JSON object; download the file again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ConversionError(f"{name}: its header's __metadata__ is not a map of strings")
    start = len(head)
    tensors = {key: _entry(entry, start, f"{name}: {short(key)}") for key, entry in header.items()}
    _no_holes(tensors, start, file_bytes, name)
    return tensors


class SafetensorsFile(MappedFile):
    """One file, mapped into memory and checked.

    Attributes:
        head: its first 8 + n bytes, length field and header.

    Raises:
        ConversionError: the file is missing, truncated, or no safetensors file.
    """

    head: bytes

    def __init__(self, path: Path):
        if not path.exists():
            raise ConversionError(f"{path.name}: is not in {path.parent}; download it again")
        if not path.is_file():
            raise ConversionError(f"{path}: is no ordinary file, expected a safetensors file")
        self.open(path)
        self.head = self._read_head()
        self.tensors = parse_header(self.head, self.nbytes, self.name)

    @classmethod
    def described(cls, name: str, head: bytes, nbytes: int) -> SafetensorsFile:
        """A file that is elsewhere, by its first bytes and its size; :meth:`attach` it before its content is read."""
        file = cls.__new__(cls)
        file.name, file.head, file.nbytes = name, head, nbytes
        file.tensors = parse_header(head, nbytes, name)
        return file

    def attach(self, path: Path) -> None:
        """The file has come, and stands at `path`. Raises ConversionError: it is not the one that was described."""
        name, nbytes = self.name, self.nbytes
        self.open(path)
        self.name = name
        if self.nbytes != nbytes or self._read_head() != self.head:
            raise ConversionError(
                f"{self.name}: is not the file that its header announced; download it again"
            )

    @property
    def framing(self) -> tuple[tuple[int, bytes], ...]:
        """What stands in the file besides tensors, as (offset, bytes)."""
        return ((0, self.head),)

    def _read_head(self) -> bytes:
        field = bytearray(min(8, self.nbytes))
        self.read(0, memoryview(field))
        head = bytearray(head_bytes(bytes(field), self.nbytes, self.name))
        self.read(0, memoryview(head))
        return bytes(head)


def head_bytes(field: bytes, file_bytes: int, name: str) -> int:
    """How many bytes length field and header have, 8 + n, by the file's first 8 bytes.

    Raises:
        ConversionError: the file is too short for what they say, or n is more than is accepted.
    """
    if len(field) < 8:
        raise ConversionError(
            f"{name}: has {file_bytes} bytes, too few for a safetensors file; download it again"
        )
    (n,) = struct.unpack("<Q", field)
    if n > MAX_HEADER_BYTES:
        raise ConversionError(
            f"{name}: its header claims {n} bytes, at most {MAX_HEADER_BYTES} are accepted; "
            "is it a safetensors file?"
        )
    if 8 + n > file_bytes:
        raise ConversionError(
            f"{name}: is truncated, its header alone has {8 + n} bytes, the file {file_bytes}; download it again"
        )
    return 8 + n


def strict_json(text: str) -> Any:
    """JSON in which no object has a name twice. Raises ValueError, RecursionError."""
    return json.loads(text, object_pairs_hook=_no_duplicates)


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        name, _ = Counter(key for key, _ in pairs).most_common(1)[0]
        raise ValueError(f"it names {short(name)} twice")
    return keys


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 63


def _entry(entry: Any, start: int, name: str) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ConversionError(f"{name}: its header entry is not of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConversionError(
            f"{name}: dtype {short(dtype)} is none that this reader knows ({', '.join(DTYPES)})"
        )
    if not isinstance(shape, list) or len(shape) > MAX_RANK or not all(map(_count, shape)):
        raise ConversionError(f"{name}: shape {short(shape)} is not a list of at most {MAX_RANK} sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_count, offsets)):
        raise ConversionError(f"{name}: data_offsets {short(offsets)} are not two positions")
    begin, end = offsets
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != wanted:
        raise ConversionError(
            f"{name}: data_offsets {short(offsets)} do not span the bytes of shape {short(shape)} in {dtype}; "
            "the file is damaged or forged"
        )
    return TensorInfo(tuple(shape), DTYPES[dtype], start + begin, end - begin)


def _no_holes(tensors: dict[str, TensorInfo], start: int, file_bytes: int, name: str) -> None:
    at, before = start, "the header"
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != at:
            what = "overlaps" if info.offset < at else "leaves a hole after"
            raise ConversionError(f"{name}: {short(key)} {what} {before}; the file is damaged or forged")
        at, before = info.offset + info.nbytes, short(key)
    if at > file_bytes:
        raise ConversionError(
            f"{name}: is truncated, its header describes {at} bytes, the file has {file_bytes}; download it again"
        )
    if at < file_bytes:
        raise ConversionError(f"{name}: has {file_bytes - at} bytes after its last tensor; download it again")
