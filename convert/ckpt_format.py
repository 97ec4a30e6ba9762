"""The layout of a MindSpore ``.ckpt`` file, from names, shapes and dtypes alone.

Such a file is one protobuf message, written by hand here so that every tensor has its final place before it is there:

    Checkpoint:  value = 1 (Value), repeated
    Value:       tag = 1 (string), tensor = 2 (TensorProto)
    TensorProto: dims = 1 (int64), repeated; tensor_type = 2 (string); tensor_content = 3 (bytes)

Neighbouring values with the same tag are slices of one tensor, whose contents are joined. Where nothing is sliced,
this is byte for byte what ``ms.save_checkpoint`` writes. ``ms.load_checkpoint`` holds the file twice, as it is and
parsed, and MindSpore 2.10 refuses one larger than the memory that Linux calls free, page cache not counted.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from .errors import ConversionError
from .mapping import Spec
from .transforms import DTYPES

SLICE_BYTES = 512 << 20  # MindSpore's own slices have at most this; protobuf allows less than 2 GiB

# What every implementation of protobuf reads. MindSpore asks for the one in Python, which reads more, but gets another
# where protobuf was imported before MindSpore, and to that one a file of 2.5 GiB is corrupt.
MAX_FILE_BYTES = (2 << 30) - 1
TYPES = {"bfloat16": "BFloat16", "float16": "Float16", "float32": "Float32"}


@dataclass(frozen=True)
class Slice:
    """`nbytes` of a tensor from its byte `begin` on stand at `offset` of the file."""

    offset: int
    begin: int
    nbytes: int


@dataclass(frozen=True)
class Layout:
    """A file of `nbytes`: what stands between the tensors, (offset, bytes), and the slices that each one consists of."""

    nbytes: int
    framing: tuple[tuple[int, bytes], ...]
    slices: Mapping[str, tuple[Slice, ...]]


def lay_out(tensors: Mapping[str, Spec], slice_bytes: int = SLICE_BYTES) -> Layout:
    """Where everything stands in a file that holds `tensors` in this order.

    Args:
        slice_bytes: a larger tensor is cut into slices of this.

    Raises:
        ConversionError: the file would have more than MAX_FILE_BYTES.
    """
    framing: list[tuple[int, bytes]] = []
    slices: dict[str, tuple[Slice, ...]] = {}
    at = 0
    for name, spec in tensors.items():
        nbytes = math.prod(spec.shape) * DTYPES[spec.dtype].itemsize
        parts = []
        for begin in range(0, nbytes, slice_bytes):
            n = min(slice_bytes, nbytes - begin)
            head = _before_content(name, spec, n)
            framing.append((at, head))
            parts.append(Slice(at + len(head), begin, n))
            at += len(head) + n
        slices[name] = tuple(parts)
    if at > MAX_FILE_BYTES:
        raise ConversionError(
            f".ckpt: a file of {len(tensors)} tensors from {next(iter(tensors))} on would have {at} bytes, "
            f"MindSpore reads at most {MAX_FILE_BYTES} for certain; choose a smaller shard size"
        )
    return Layout(at, tuple(framing), slices)


def _before_content(name: str, spec: Spec, nbytes: int) -> bytes:
    """A value up to its content, which has `nbytes` and ends all of value, tensor and content."""
    tensor = b"".join(b"\x08" + _varint(dim) for dim in spec.shape)
    tensor += _field(2, TYPES[spec.dtype].encode()) + _field(3, nbytes)
    value = _field(1, name.encode("utf-8")) + _field(2, len(tensor) + nbytes) + tensor
    return _field(1, len(value) + nbytes) + value


def _field(number: int, content: bytes | int) -> bytes:
    """A field with a length: its key, the length, and the content unless only the length is given."""
    key = _varint(number << 3 | 2)
    return key + (_varint(content) if isinstance(content, int) else _varint(len(content)) + content)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
