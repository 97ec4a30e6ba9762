"""Converted directories of any size whose weights are holes: they take no room, and read as zeros."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from kimi_vl.convert import converter
from kimi_vl.convert.planning import plan_conversion
from kimi_vl.convert.source import open_source
from kimi_vl.convert.weights import Source

SCRIPTS = Path(__file__).parents[1] / "scripts"
NO_HASH = "0" * 64


def published(directory: Path, raw: dict[str, Any]) -> Path:
    """A published checkpoint of the configuration `raw`, from headers alone."""
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    import make_synthetic

    make_synthetic.make(directory, raw, header_only=True)
    return directory


def converted(directory: Path, raw: dict[str, Any]) -> Path:
    """What `convert` would make of :func:`published`: all but the tensors' content and hashes."""
    src = published(directory.with_name(directory.name + "-published"), raw)
    weights = open_source(Source(src, src.name))
    todo = plan_conversion(weights, directory)
    directory.mkdir()
    for file in todo.files:
        with open(directory / file.name, "wb") as f:
            f.truncate(file.nbytes)
            for offset, content in file.framing:
                f.seek(offset)
                f.write(content)
    done = SimpleNamespace(
        written=dict.fromkeys((t.name for t in todo.tensors), NO_HASH),
        read={name: NO_HASH for file in weights.files.values() for name in file.tensors},
        kept=dict.fromkeys(todo.dropped, "00"),
        overflowed={},
        underflowed={},
    )
    converter._finish_conversion(todo, weights, directory, {"all": done}, False)
    return directory
