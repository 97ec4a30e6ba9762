"""The checkpoints that faults are put into."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import kimi_vl

from . import eps

DATA = Path(__file__).parents[2] / "tests" / "data"


@dataclass(frozen=True)
class Model:
    """Attributes:
    make: gives the published directory; one that must be made first is made as the one that it is given.
    sizes: of its bundles.
    master: a checkpoint with the same weights in fp32.
    """

    name: str
    make: Callable[[Path], Path]
    sizes: dict[str, Any]
    master: Path | None = None

    def source(self, room: Path) -> Path:
        """Its published directory."""
        return self.make(room / f"published-{self.name}")


def _made_for_eps(path: Path) -> Path:
    return path if path.is_dir() else eps.make(path, DATA / "tiny8-bf16" / "config.json")


# Two contexts and several chunks: over borders between caches and between calls.
_SMALL = {"seq": (64, 128), "prefill_chunk": 32, "image_patches": (64,)}
_MODELS = (
    Model("tiny8", lambda path: DATA / "tiny8-bf16", _SMALL, DATA / "tiny8-fp32"),
    Model("eps", _made_for_eps, _SMALL),
    Model(
        "nano",
        lambda path: Path(kimi_vl.nano_path()),
        {"seq": (256,), "prefill_chunk": 64, "image_patches": (128,)},
    ),
)
MODELS = {model.name: model for model in _MODELS}
