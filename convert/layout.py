"""Where everything stands in a file of tensors that is going to be written."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from .manifest import content_hash
from .mapped_file import TensorInfo


@dataclass(frozen=True)
class Layout:
    """A file of `nbytes`: the tensors' `places`, and `framing`, what stands before and between them: (offset, bytes)."""

    nbytes: int
    framing: tuple[tuple[int, bytes], ...]
    places: Mapping[str, TensorInfo]


def framing_hash(framing: tuple[tuple[int, bytes], ...]) -> str:
    """BLAKE3 of a file's framing, joined."""
    return content_hash(b"".join(piece for _, piece in framing))
