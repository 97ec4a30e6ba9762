"""The golden pack: what a bundle's graphs are asked, and what the Torch reference answers, in one .npz that numpy reads.

A pack holds, for some cases of the parity suite, every graph call with its inputs in order, and of the answers what a
device needs to be judged: sampled hidden states and norms of each layer, the best logits, the experts chosen and how
near the choice was, greedy tokens; and how far from them rounding may lead. It names the bundle that it was made for by
the SHA-256 of each file.

Layout: the member `index` is JSON as bytes, all other members are arrays that it refers to by name. `digest` in the index is
the SHA-256 of everything else. The same recording gives the same bytes.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

FORMAT, VERSION = "kimi_vl-golden-pack", 1
LARGEST = 5_000_000  # bytes of a pack


class PackError(ValueError):
    """A pack that is damaged, of another version, or for another bundle."""


class Pack:
    """A pack that was read and whose digest agrees.

    Attributes:
        index: `bundle` (`manifest` and `files`: name -> SHA-256), `reference`, `target`, `taps`, `contexts`, `layers`,
            `width` of the cache, `columns`, and `cases`, see ``device_play``.
        digest: names this pack in reports.
    """

    def __init__(self, index: dict, arrays: dict[str, np.ndarray]) -> None:
        self.index = index
        self.arrays = arrays
        self.digest: str = index["digest"]
        self.cases: list[dict] = index["cases"]

    def array(self, name: str | None) -> Any:
        """An array by its name; None has none."""
        return None if name is None else self.arrays[name]

    def case(self, name: str) -> dict:
        return next(case for case in self.cases if case["name"] == name)

    def require_bundle(self, directory: Path) -> None:
        """Raises PackError: the pack was recorded for another bundle than the one in `directory`."""
        found = file_hash(directory / "bundle.json")
        expected = self.index["bundle"]["manifest"]
        if found != expected:
            raise PackError(
                f"bundle.json has SHA-256 {found[:12]}, the pack was recorded for {expected[:12]}; record a pack for this "
                "bundle with verify-parity record"
            )


def read_pack(path: Path) -> Pack:
    """The pack in a file.

    Raises:
        PackError: it is missing, damaged, or of another version.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as e:
        raise PackError(f"{path}: cannot be read ({e.strerror})") from None
    try:
        with np.load(io.BytesIO(content), allow_pickle=False) as members:
            arrays = {name: members[name] for name in members.files}
        index = json.loads(arrays.pop("index").tobytes())
        form = index["format"], index["version"]
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as e:
        raise PackError(f"{path}: is damaged or no golden pack ({e}); record it again") from None
    if form != (FORMAT, VERSION):
        raise PackError(
            f"{path}: is {form[0]} version {form[1]}, this program reads {FORMAT} {VERSION}; record it again"
        )
    if index.get("digest") != content_digest(index, arrays):
        raise PackError(
            f"{path}: is damaged: its content does not have the digest it was saved with; record it again"
        )
    return Pack(index, arrays)


def write_pack(path: Path, index: dict, arrays: dict[str, np.ndarray]) -> Pack:
    """Writes a pack; the file appears whole or not at all.

    Raises:
        PackError: it would be larger than `LARGEST`.
    """
    index = {"format": FORMAT, "version": VERSION, **index}
    index["digest"] = content_digest(index, arrays)
    text = json.dumps(index, allow_nan=False).encode()  # in its order: limits along the network
    out = io.BytesIO()
    # numpy gives every member the same date, so equal content gives equal bytes.
    members: dict[str, Any] = {
        "index": np.frombuffer(text, np.uint8),
        **{k: arrays[k] for k in sorted(arrays)},
    }
    np.savez_compressed(out, **members)
    if out.tell() > LARGEST:
        raise PackError(
            f"the pack has {out.tell() / 1e6:.1f} MB, expected at most {LARGEST / 1e6:.0f}; record fewer cases with --cases"
        )
    temporary = Path(f"{path}.part")
    temporary.write_bytes(out.getvalue())
    os.replace(temporary, path)
    return Pack(index, arrays)


def content_digest(index: dict, arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 of an index without its digest, and of the arrays by name, dtype, shape and content."""
    rest = {key: value for key, value in index.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content."""
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()
