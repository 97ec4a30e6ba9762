"""MindSpore's own format, ``.ckpt``: a file's layout, from names, shapes and dtypes alone, and its reading.

Such a file is one protobuf message, written by hand here so that every tensor has its final place before it is there:

    Checkpoint:  value = 1 (Value), repeated
    Value:       tag = 1 (string), tensor = 2 (TensorProto)
    TensorProto: dims = 1 (int64), repeated; tensor_type = 2 (string); tensor_content = 3 (bytes)

``ms.save_checkpoint`` writes the same bytes, but that it cuts tensors of more than 512 MB into slices, which
``ms.load_checkpoint`` joins again. That one holds the file twice, as it is and parsed, and MindSpore 2.10 refuses a
file larger than the memory that Linux calls free, page cache not counted; so shards had better be small.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

from .errors import ConversionError
from .layout import Layout
from .mapped_file import MappedFile, TensorInfo
from .mapping import Spec
from .transforms import DTYPES

# What every implementation of protobuf reads. MindSpore asks for the one in Python, which reads more, but gets another
# where protobuf was imported before MindSpore, and to that one a file of 2.5 GiB is corrupt.
MAX_FILE_BYTES = (2 << 30) - 1
TYPES = {"bfloat16": "BFloat16", "float16": "Float16", "float32": "Float32"}


def lay_out(tensors: Mapping[str, Spec]) -> Layout:
    """The layout of a file that holds `tensors` in this order.

    Raises:
        ConversionError: the file would have more than MAX_FILE_BYTES.
    """
    framing: list[tuple[int, bytes]] = []
    places: dict[str, TensorInfo] = {}
    at = 0
    for name, spec in tensors.items():
        nbytes = math.prod(spec.shape) * DTYPES[spec.dtype].itemsize
        head = _before_content(name, spec, nbytes)
        framing.append((at, head))
        places[name] = TensorInfo(spec.shape, DTYPES[spec.dtype], at + len(head), nbytes)
        at += len(head) + nbytes
    if at > MAX_FILE_BYTES:
        raise ConversionError(
            f"--max-shard-size: a .ckpt file from {next(iter(tensors))} on would have {at} bytes, "
            f"MindSpore reads at most {MAX_FILE_BYTES} for certain; choose a smaller one"
        )
    return Layout(at, tuple(framing), places)


class CkptFile(MappedFile):
    """A file that :func:`lay_out` describes.

    Raises:
        ConversionError: it is missing, or what stands between the tensors is not what was written.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Spec]):
        layout = lay_out(tensors)
        self.tensors, self.framing = layout.places, layout.framing
        if not path.is_file():
            raise ConversionError(f"{path.name}: is not in {path.parent}; convert the checkpoint again")
        self.open(path)
        if self.nbytes != layout.nbytes:
            raise ConversionError(
                f"{path}: has {self.nbytes} bytes, expected {layout.nbytes}; convert the checkpoint again"
            )
        for offset, piece in layout.framing:
            found = bytearray(len(piece))
            self.read(offset, memoryview(found))
            if found != piece:
                raise ConversionError(f"{path}: is damaged at byte {offset}; convert the checkpoint again")


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
