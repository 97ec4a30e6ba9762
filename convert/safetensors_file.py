"""Reading safetensors files that nobody vouches for.

The format: eight bytes header length n (little endian), n bytes of JSON, then the tensors' bytes without holes. A
header is data from a stranger: every number is checked against the file before anything is read by it.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from .errors import ConversionError

MAX_HEADER_BYTES = 16 << 20  # the published 16-billion checkpoint needs 0.8 MB for all its shards together

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


@dataclass(frozen=True)
class TensorInfo:
    """A header's entry: `offset` is from the start of the file, `nbytes` the length there."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    nbytes: int


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
        header = json.loads(head[8:].decode("utf-8"), object_pairs_hook=_no_duplicates)
    except _Duplicate as e:
        raise ConversionError(f"{name}: its header names {e} twice; the file is damaged or forged") from None
    except (ValueError, RecursionError) as e:
        raise ConversionError(
            f"{name}: its header is not valid JSON ({e}); download the file again"
        ) from None
    if not isinstance(header, dict):
        raise ConversionError(f"{name}: its header is not a JSON object; download the file again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ConversionError(f"{name}: its header's __metadata__ is not a map of strings")
    start = len(head)
    tensors = {key: _entry(entry, start, f"{name}: {key!r}") for key, entry in header.items()}
    _no_holes(tensors, start, file_bytes, name)
    return tensors


class SafetensorsFile:
    """One file, mapped into memory and checked. Arrays that it gives are read-only views of the map.

    Raises:
        ConversionError: the file is missing, truncated, or no safetensors file.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as f:
                self.nbytes = os.fstat(f.fileno()).st_size
                self.head = _read_head(f, self.nbytes, path.name)
                self.tensors = parse_header(self.head, self.nbytes, path.name)
                self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ConversionError(f"{path.name}: is not in {path.parent}; download it again") from None
        except IsADirectoryError:
            raise ConversionError(f"{path}: is a directory, expected a safetensors file") from None

    def array(self, name: str) -> np.ndarray:
        info = self.tensors[name]
        flat = np.frombuffer(self._map, info.dtype, info.nbytes // info.dtype.itemsize, info.offset)
        return flat.reshape(info.shape)


def _read_head(f: Any, file_bytes: int, name: str) -> bytes:
    field = f.read(8)
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
    return field + f.read(n)


class _Duplicate(Exception):
    pass


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        seen: set[str] = set()
        raise _Duplicate(next(repr(k) for k, _ in pairs if k in seen or seen.add(k)))  # type: ignore[func-returns-value]
    return keys


def _count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _entry(entry: Any, start: int, name: str) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise ConversionError(f"{name}: its header entry is not of dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ConversionError(f"{name}: dtype {dtype!r} is none that this reader knows ({', '.join(DTYPES)})")
    if not isinstance(shape, list) or not all(map(_count, shape)):
        raise ConversionError(f"{name}: shape {shape!r} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(map(_count, offsets)):
        raise ConversionError(f"{name}: data_offsets {offsets!r} are not two positions")
    begin, end = offsets
    wanted = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != wanted:
        raise ConversionError(
            f"{name}: data_offsets {offsets} span {end - begin} bytes, shape {shape} in {dtype} takes {wanted}"
        )
    return TensorInfo(tuple(shape), DTYPES[dtype], start + begin, end - begin)


def _no_holes(tensors: dict[str, TensorInfo], start: int, file_bytes: int, name: str) -> None:
    at, before = start, "the header"
    for key, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != at:
            what = "overlaps" if info.offset < at else "leaves a hole after"
            raise ConversionError(f"{name}: {key!r} {what} {before}; the file is damaged or forged")
        at, before = info.offset + info.nbytes, repr(key)
    if at > file_bytes:
        raise ConversionError(
            f"{name}: is truncated, its header describes {at} bytes, the file has {file_bytes}; download it again"
        )
    if at < file_bytes:
        raise ConversionError(f"{name}: has {file_bytes - at} bytes after its last tensor; download it again")
