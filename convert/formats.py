"""The formats of converted weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from . import ckpt_format, dual_format
from .ckpt_format import CkptFile
from .layout import Layout
from .mapping import Spec
from .safetensors_file import SafetensorsFile

Shard = SafetensorsFile | CkptFile


@dataclass(frozen=True)
class Format:
    """How shards are named, split by default, laid out, and opened by their path and the tensors that they hold."""

    suffix: str
    index: str
    shard_bytes: int
    lay_out: Callable[[Mapping[str, Spec]], Layout]
    open: Callable[[Path, Mapping[str, Spec]], Shard]


FORMATS = {
    "safetensors": Format(
        "safetensors",
        "model.safetensors.index.json",
        5_000_000_000,
        dual_format.lay_out,
        lambda path, tensors: SafetensorsFile(path),
    ),
    # MindSpore holds a whole .ckpt file twice while it loads it.
    "ckpt": Format("ckpt", "model.ckpt.index.json", 1_000_000_000, ckpt_format.lay_out, CkptFile),
}
DEFAULT_FORMAT = "safetensors"
