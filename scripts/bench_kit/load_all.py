"""The conversion that one writes in ten minutes: load all, rename, save all. What ours is held against.

    python scripts/bench_kit/load_all.py SRC DST

It changes names and no layouts, so it does less than a conversion has to.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import ml_dtypes  # noqa: F401 (gives NumPy the name bfloat16)
from safetensors.numpy import load_file, save_file


def load_all_save_all(source: Path, target: Path) -> None:
    """Reads all weights of a directory, and writes them under other names to one file on the disk."""
    tensors = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors |= load_file(file)
    renamed = {name.removeprefix("language_model."): tensor for name, tensor in tensors.items()}
    target.mkdir()
    save_file(renamed, target / "model.safetensors")
    with open(target / "model.safetensors", "rb") as f:
        os.fsync(f.fileno())


if __name__ == "__main__":
    load_all_save_all(Path(sys.argv[1]), Path(sys.argv[2]))
