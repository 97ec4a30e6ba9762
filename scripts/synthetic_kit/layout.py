"""Which tensors a published checkpoint holds, and how they lie in its files.

As Hugging Face's writers do it: tensors fill files in the network's order, a file holds them by dtype (wide ones first)
and name, the index lists all by name.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from kimi_vl.convert import mapping
from kimi_vl.modeling.configuration import ModelConfig

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000
ITEM_BYTES = {"F32": 4, "BF16": 2}


@dataclass(frozen=True)
class Tensor:
    name: str
    shape: tuple[int, ...]
    dtype: str  # safetensors' name for it

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Shard:
    """A safetensors file: its first bytes, and its tensors with their places in the file."""

    name: str
    head: bytes
    tensors: tuple[tuple[Tensor, int], ...]

    @property
    def nbytes(self) -> int:
        return len(self.head) + sum(tensor.nbytes for tensor, _ in self.tensors)


def published_tensors(config: ModelConfig) -> list[Tensor]:
    """All tensors in the network's order, rotary frequencies included."""
    return [
        Tensor(side.name, side.shape, "F32" if side.name.endswith("inv_freq") else "BF16")
        for entry in mapping.entries(config)
        for side in entry.published
    ]


def shards(tensors: Iterable[Tensor], limit: int = SHARD_BYTES) -> list[Shard]:
    """Files of at most `limit` bytes of tensors each; a larger tensor has a file of its own."""
    groups: list[list[Tensor]] = []
    used = 0
    for tensor in tensors:
        if not groups or used + tensor.nbytes > limit:
            groups.append([])
            used = 0
        groups[-1].append(tensor)
        used += tensor.nbytes
    return [
        _shard(f"model-{number:05}-of-{len(groups):05}.safetensors", group)
        for number, group in enumerate(groups, 1)
    ]


def index(files: Sequence[Shard]) -> str:
    places = {tensor.name: shard.name for shard in files for tensor, _ in shard.tensors}
    total = sum(tensor.nbytes for shard in files for tensor, _ in shard.tensors)
    return json.dumps(
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}, indent=2
    )


def _shard(name: str, tensors: Iterable[Tensor]) -> Shard:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets: list[tuple[Tensor, int]] = []
    at = 0
    for tensor in sorted(tensors, key=lambda t: (-ITEM_BYTES[t.dtype], t.name)):
        header[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": tensor.shape,
            "data_offsets": (at, at + tensor.nbytes),
        }
        offsets.append((tensor, at))
        at += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    head = struct.pack("<Q", len(text)) + text
    return Shard(name, head, tuple((tensor, len(head) + at) for tensor, at in offsets))
