"""Small bundles, each exported once for all tests that read it."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
from golden import DATA

from kimi_vl.convert import convert
from kimi_vl.convert.manifest import content_hash
from kimi_vl.export import export, plan_export
from kimi_vl.export.plan import open_converted
from kimi_vl.modeling.kernels import library

# Golden pictures have at most 64 patches, golden sequences at most 253 tokens: over two contexts and several chunks, and some
# have less than 32, which is the smaller chunk of one bundle.
SIZES: dict[str, dict[str, Any]] = {
    "tiny8-bf16": {"seq": (128, 256), "prefill_chunk": 64, "image_patches": (64,), "taps": True},
    "tiny8-fp32": {"seq": (256,), "prefill_chunk": (32, 64), "image_patches": (64,), "batch": 2},
}


@functools.cache
def _room() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory()


@functools.cache
def converted(checkpoint: str) -> Path:
    """The converted directory of a golden checkpoint."""
    path = Path(_room().name) / f"ckpt-{checkpoint}"
    convert(DATA / checkpoint, path)
    return path


@contextmanager
def plain_graphs() -> Iterator[None]:
    """CPU bundles that are planned meanwhile call no library, as where none was built."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(library.SWITCH, "off")
        yield


@functools.cache
def bundle(checkpoint: str, operators: bool = True) -> Path:
    """The CPU bundle of a golden checkpoint, in `SIZES`; not to be changed. It calls the C++ `operators`, or is plain."""
    path = Path(_room().name) / f"mindir-{checkpoint}-{'operators' if operators else 'plain'}"
    with nullcontext() if operators else plain_graphs():
        made = plan_export(open_converted(converted(checkpoint)), target="cpu", **SIZES[checkpoint])
    export(made, path)
    return path


def copy(checkpoint: str, path: Path, operators: bool = True) -> Path:
    """A bundle that may be damaged."""
    return Path(shutil.copytree(bundle(checkpoint, operators), path))


def edit(directory: Path, change: Any) -> None:
    """Change a manifest as parsed JSON; the hashes of graphs are made right again."""
    path = directory / "bundle.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    for graph in manifest.get("graphs", {}).values():
        file = directory / graph["file"]
        if file.is_file():
            content = file.read_bytes()
            graph |= {"nbytes": len(content), "hash": content_hash(content)}
    path.write_text(json.dumps(manifest))
